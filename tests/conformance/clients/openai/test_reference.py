"""The Python examples that other systems document, with their own model names."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.serving import Server, serve

PARIS = "The capital of France is Paris."
FRANCE = "What is the capital of France?"


def python(server: Server, key: str = "not-needed") -> OpenAI:
    """Returns the SDK's client as the pages create it."""
    return OpenAI(base_url=server.url, api_key=key)


@pytest.fixture
def mine() -> Iterator[Server]:
    """A server of the built-in model under the name that NPU-Stack's page uses."""
    with serve("--model-name", "my-model") as server:
        yield server


@pytest.mark.parametrize("name", ["slp-orchestra-mini", "gemma3-1b"])
def test_smartloop_s_pages(name: str) -> None:
    with serve("--model-name", name) as server, python(server) as client:
        said = client.chat.completions.create(model=name, messages=[{"role": "user", "content": FRANCE}])
        assert said.choices[0].message.content == PARIS
        said = client.chat.completions.create(
            model=name,
            messages=[
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "My name is Alice."},
                {"role": "assistant", "content": "Hello Alice! How can I help you today?"},
                {"role": "user", "content": "What's my name?"},
            ],
        )
        assert said.choices[0].message.content == "Your name is Alice."


def test_smg_s_chat() -> None:
    name = "meta-llama/Llama-3.1-8B-Instruct"
    with (
        serve("--model-name", name, "--api-key", "your-api-key") as server,
        python(server, "your-api-key") as client,
    ):
        said = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hello!"}])
    assert said.choices[0].message.content == "Hello! How can I help you today?"


def test_npu_stack_s_python(mine: Server) -> None:
    with python(mine, "any") as client:
        said = client.chat.completions.create(
            model="my-model", messages=[{"role": "user", "content": "Hello!"}]
        )
        assert said.choices[0].message.content
        pieces = []
        for chunk in client.chat.completions.create(
            model="my-model", messages=[{"role": "user", "content": "Tell me a story"}], stream=True
        ):
            if chunk.choices[0].delta.content:
                pieces.append(chunk.choices[0].delta.content)
        assert "".join(pieces).startswith("Once upon a time")
        vector = client.embeddings.create(model="my-model", input="Hello world").data[0].embedding
        assert len(vector) == 256
