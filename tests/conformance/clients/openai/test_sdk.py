"""OpenAI's Python SDK against the built-in model and the scripted engine."""

import asyncio
import os
import signal
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.serving import Server, serve

FRANCE = "What is the capital of France?"
ALICE = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "My name is Alice."},
    {"role": "assistant", "content": "Hello Alice! How can I help you today?"},
    {"role": "user", "content": "What's my name?"},
]


@pytest.fixture
def client(builtin: Server) -> Iterator[OpenAI]:
    """Returns the SDK's client as its quick start creates it."""
    with OpenAI(base_url=builtin.url, api_key="not-needed", max_retries=0) as client:
        yield client


def test_the_first_question(client: OpenAI) -> None:
    response = client.chat.completions.create(
        model="tinyoai-chat", messages=[{"role": "user", "content": FRANCE}], temperature=0
    )
    assert response.choices[0].message.content == "The capital of France is Paris."
    assert response.choices[0].finish_reason == "stop"
    assert response.usage is not None
    assert response.usage.completion_tokens > 3


def test_a_conversation_is_remembered(client: OpenAI) -> None:
    response = client.chat.completions.create(model="tinyoai-chat", messages=ALICE, temperature=0)  # type: ignore[call-overload]
    assert response.choices[0].message.content == "Your name is Alice."


def test_a_joined_stream_equals_the_whole_answer(client: OpenAI) -> None:
    ask = {"model": "tinyoai-chat", "messages": [{"role": "user", "content": "Tell me a story."}], "seed": 3}
    whole = client.chat.completions.create(**ask).choices[0].message.content  # type: ignore[call-overload]
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**ask, stream=True)  # type: ignore[call-overload]
    ]
    assert "".join(pieces) == whole
    assert len(pieces) > 20


def test_usage_in_a_stream(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tinyoai-chat",
            messages=[{"role": "user", "content": FRANCE}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens > 10


def test_legacy_completion(client: OpenAI) -> None:
    response = client.completions.create(
        model="tinyoai-chat", prompt="The quick brown fox", max_tokens=50, temperature=0
    )
    assert response.choices[0].text == " jumps over the lazy dog."


def test_the_sdk_s_exceptions(client: OpenAI) -> None:
    message = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=message)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(
            model="tinyoai-chat", messages=[{"role": "user", "content": "long " * 3000}]
        )
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as odd:
        client.chat.completions.create(model="tinyoai-chat", messages=message, temperature=3)  # type: ignore[arg-type]
    assert odd.value.param == "temperature"
    assert client.models.list().data[0].id == "tinyoai-chat"
    assert client.models.retrieve("tinyoai-chat").owned_by


def test_asynchronous_and_many_at_once(builtin: Server) -> None:
    questions = {
        FRANCE: "The capital of France is Paris.",
        "What is the capital of Japan?": "The capital of Japan is Tokyo.",
        "What is the capital of Egypt?": "The capital of Egypt is Cairo.",
        "What is the capital of Canada?": "The capital of Canada is Ottawa.",
    }

    async def ask(client: AsyncOpenAI, question: str) -> str:
        stream = await client.chat.completions.create(
            model="tinyoai-chat",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> None:
        async with AsyncOpenAI(base_url=builtin.url, api_key="x", max_retries=0) as client:
            answers = await asyncio.gather(*(ask(client, question) for question in list(questions) * 4))
        assert answers == list(questions.values()) * 4

    asyncio.run(main())


def test_a_worker_killed_in_mid_stream_fails_only_that_stream() -> None:
    with serve() as server, OpenAI(base_url=server.url, api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="tinyoai-chat",
            messages=[{"role": "user", "content": "Tell me a story."}],
            stream=True,
            extra_body={"ignore_eos": True},
        )
        first = next(iter(stream))
        assert first.choices[0].delta.role == "assistant"
        os.kill(server.workers[0], signal.SIGKILL)
        with pytest.raises(openai.APIError, match="SIGKILL"):
            for _ in stream:
                pass
        assert server.say(FRANCE) == "The capital of France is Paris."
        assert server.get("/health").json["status"] == "ok"


def test_api_keys() -> None:
    with serve("--engine", "fake", "--api-key", "sk-right") as server:
        with OpenAI(base_url=server.url, api_key="sk-wrong", max_retries=0) as wrong:
            with pytest.raises(openai.AuthenticationError) as caught:
                wrong.models.list()
            assert caught.value.code == "invalid_api_key"
        with OpenAI(base_url=server.url, api_key="sk-right", max_retries=0) as right:
            assert [model.id for model in right.models.list()] == ["fake"]


def test_a_rate_limit() -> None:
    with (
        serve("--engine", "fake", "--rate-limit", "2") as server,
        OpenAI(base_url=server.url, api_key="any", max_retries=0) as client,
    ):
        with pytest.raises(openai.RateLimitError) as caught:
            for _ in range(20):
                assert [model.id for model in client.models.list()] == ["fake"]
        assert caught.value.code == "rate_limit_exceeded"


def test_its_time_limit_cuts_an_answer(fake: Server) -> None:
    with OpenAI(base_url=fake.url, api_key="any", max_retries=0, timeout=1.5) as client:
        got = client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": '!{"text": "x", "repeat": 3000, "step_ms": 5}'}],
        )
    assert got.choices[0].finish_reason == "length"
    assert set(got.choices[0].message.content or "") == {"x"}
