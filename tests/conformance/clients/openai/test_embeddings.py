"""OpenAI's SDK requests embeddings as base64 by default."""

import asyncio

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.serving import Server


def test_both_formats(builtin: Server) -> None:
    with OpenAI(base_url=builtin.url, api_key="not-needed", max_retries=0) as client:
        default = client.embeddings.create(model="tinyoai-chat", input="Hello world")
        floats = client.embeddings.create(model="tinyoai-chat", input="Hello world", encoding_format="float")
        many = client.embeddings.create(
            model="tinyoai-chat", input=[f"text {number}" for number in range(100)], dimensions=16
        )
        with pytest.raises(openai.BadRequestError) as empty:
            client.embeddings.create(model="tinyoai-chat", input="")
    assert len(default.data[0].embedding) == 256
    assert default.data[0].embedding == pytest.approx(floats.data[0].embedding, abs=1e-9)
    assert default.usage.prompt_tokens > 1
    assert [entry.index for entry in many.data] == list(range(100))
    assert {len(entry.embedding) for entry in many.data} == {16}
    assert empty.value.param == "input"


def test_many_at_once(builtin: Server) -> None:
    texts = [f"number {number}" for number in range(24)]

    async def main() -> list[list[float]]:
        async with AsyncOpenAI(base_url=builtin.url, api_key="x", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.embeddings.create(model="tinyoai-chat", input=text) for text in texts)
            )
        return [answer.data[0].embedding for answer in answers]

    plain = builtin.post("/v1/embeddings", input=texts).json["data"]
    for got, entry in zip(asyncio.run(main()), plain, strict=True):
        assert got == pytest.approx(entry["embedding"], abs=1e-9)
