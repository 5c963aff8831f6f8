"""LangChain's classes for OpenAI against the built-in model."""

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import SecretStr

from tests.serving import Server, serve

pytestmark = pytest.mark.filterwarnings("ignore")

PARIS = "The capital of France is Paris."
NPU = "An NPU, a neural processing unit, is a chip"


@pytest.fixture(scope="module")
def mine() -> Iterator[Server]:
    """A server of the built-in model under the name that NPU-Stack's page uses."""
    with serve("--model-name", "my-model") as server:
        yield server


@pytest.fixture
def http() -> Iterator[dict[str, Any]]:
    """HTTP clients for LangChain that are closed here, because LangChain closes none itself."""
    asynchronous = httpx.AsyncClient()
    with httpx.Client() as client:
        yield {"http_client": client, "http_async_client": asynchronous}


def test_npu_stack_s_langchain(mine: Server, http: dict[str, Any]) -> None:
    llm = ChatOpenAI(base_url=mine.url, api_key=SecretStr("any"), model="my-model", temperature=0.7, **http)
    assert str(llm.invoke("What is an NPU?").content).startswith(NPU)


def test_langchain_further(mine: Server, http: dict[str, Any]) -> None:
    llm = ChatOpenAI(
        base_url=mine.url,
        api_key=SecretStr("any"),
        model="my-model",
        temperature=0,
        stream_usage=True,
        **http,
    )
    said = llm.invoke([SystemMessage("Answer in one word."), HumanMessage("What is the capital of Japan?")])
    assert said.content == "Tokyo."
    assert said.usage_metadata is not None
    assert said.usage_metadata["output_tokens"] > 0
    pieces = list(llm.stream("What is the capital of France?"))
    assert "".join(str(piece.content) for piece in pieces) == PARIS
    many = llm.batch([f"What is {a} + {b}?" for a, b in ((1, 2), (10, 20), (30, 12))])
    assert [message.content for message in many] == ["1 + 2 = 3.", "10 + 20 = 30.", "30 + 12 = 42."]

    async def later() -> str:
        async with http["http_async_client"]:
            return str((await llm.ainvoke("Hello!")).content)

    assert asyncio.run(later())
    vectors = OpenAIEmbeddings(
        base_url=mine.url,
        api_key=SecretStr("any"),
        model="my-model",
        check_embedding_ctx_length=False,
        **http,
    )
    assert len(vectors.embed_query("Hello world")) == 256


def test_embeddings_of_similar_sentences(mine: Server, http: dict[str, Any]) -> None:
    embeddings = OpenAIEmbeddings(
        base_url=mine.url,
        api_key=SecretStr("any"),
        model="my-model",
        check_embedding_ctx_length=False,
        **http,
    )
    similar, other = embeddings.embed_documents(["The cat sat on the mat.", "What is 12 minus 7?"])
    query = embeddings.embed_query("The cat sat on a mat.")
    assert math.hypot(*query) == pytest.approx(1, abs=1e-5)
    assert sum(map(float.__mul__, query, similar)) > sum(map(float.__mul__, query, other))
