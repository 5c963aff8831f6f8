"""POST /v1/embeddings: texts or token ids in, one vector for each out."""

import asyncio
import struct
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from tinyoai import errors, wire
from tinyoai.api import generation, schema
from tinyoai.models.lease import Lease
from tinyoai.models.pool import Pool
from tinyoai.web.exchange import Exchange

TURN = 16
"""Vectors worded before others have their turn: some milliseconds for a model of width 4096."""


class Embeddings:
    """The endpoint."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __call__(self, exchange: Exchange) -> None:
        """Answers one request. Raises errors.ApiError for all that can be refused."""
        request = schema.embedding_request(await exchange.read_body())
        inputs = schema.inputs(request)
        async with self._pool.lease(request.model, schema.keep_alive(request.keep_alive)) as lease:
            await self._answer(exchange, request, inputs, lease)

    async def _answer(
        self,
        exchange: Exchange,
        request: schema.EmbeddingRequest,
        inputs: Sequence[tuple[str, str | list[int]]],
        lease: Lease,
    ) -> None:
        bodies = [
            wire.Embed(prompt=_prompt(text), dimensions=request.dimensions or 0, param=field)
            for field, text in inputs
        ]
        queue = generation.queue_fields(exchange, streamed=False)
        await lease.ready(queue.get("deadline"))
        vectors: dict[int, msgspec.Raw] = {}
        n_prompt, queue_ms = 0, 0.0
        async with aclosing(lease.run(bodies, **queue)) as source:
            async for index, event in source:
                result = generation.raise_if_failed(event)
                if isinstance(result, wire.Accepted):
                    queue_ms = max(queue_ms, result.queue_ms)
                elif isinstance(result, wire.Vector):
                    # encoded one by one as they come: thousands at once would delay everyone else
                    vectors[index] = msgspec.Raw(_encode(index, result.values, request.encoding_format))
                    if len(vectors) % TURN == 0:
                        await asyncio.sleep(0)
                elif isinstance(result, wire.Done):
                    n_prompt += result.n_prompt
                    exchange.n_tokens += result.n_prompt
        if len(vectors) != len(inputs):
            raise errors.InternalError("the model's process returned too few embeddings")
        generation.add_queue_header(exchange, queue_ms)
        data: list[Any] = [vectors[index] for index in range(len(inputs))]
        answer = schema.EmbeddingList(
            data=data,
            model=lease.name,
            usage=schema.EmbeddingUsage(prompt_tokens=n_prompt, total_tokens=n_prompt),
        )
        exchange.respond(200, generation.encode(answer))


def _prompt(given: str | list[int]) -> list[wire.Segment]:
    """Ids are taken as they are."""
    return [wire.Special("bos"), wire.Text(given)] if isinstance(given, str) else [wire.Ids(given)]


def _encode(index: int, values: bytes, encoding_format: str | None) -> bytes:
    if encoding_format == "base64":
        return generation.encode(schema.Embedding(index=index, embedding=values))
    numbers = list(struct.unpack(f"<{len(values) // 4}f", values))
    return generation.encode(schema.Embedding(index=index, embedding=numbers))
