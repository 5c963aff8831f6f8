"""POST /v1/embeddings: texts or token ids in, one vector for each out.

Owns what such a request means and how its answer is worded. All inputs go to the worker at once and come
back in order. It must not know tokens, nor how a vector is made.
"""

import asyncio
import struct
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec

from tinyoai import errors, wire
from tinyoai.api import generation, schema
from tinyoai.models.pool import Lease, Pool
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
        pooling, standing = lease.ready.pooling, generation.standing(exchange, streamed=True)

        def make(field: str, given: str | list[int], call_id: int) -> wire.Embed:
            return wire.Embed(
                id=call_id,
                prompt=_prompt(given, pooling),
                dimensions=request.dimensions or 0,
                param=field,
                **standing,
            )

        parts: list[Any] = []
        n_prompt, waited = 0, 0.0
        async with aclosing(lease.calls([partial(make, *named) for named in inputs])) as source:
            async for index, event in source:
                good = generation.good(event)
                if isinstance(good, wire.Accepted):
                    waited = max(waited, good.queue_ms)
                elif isinstance(good, wire.Vector):
                    # worded one by one as they come: thousands at once would hold everyone else up
                    parts.append(msgspec.Raw(_worded(index, good.values, request.encoding_format)))
                    if len(parts) % TURN == 0:
                        await asyncio.sleep(0)
                elif isinstance(good, wire.Done):
                    n_prompt += good.n_prompt
                    exchange.n_tokens += good.n_prompt
        if len(parts) != len(inputs):
            raise errors.InternalError("the model's process gave fewer embeddings than it was asked for")
        generation.tell_wait(exchange, waited)
        body = schema.EmbeddingList(
            data=parts,
            model=lease.model,
            usage=schema.EmbeddingUsage(prompt_tokens=n_prompt, total_tokens=n_prompt),
        )
        exchange.respond(200, generation.encode(body))


def _prompt(given: str | list[int], pooling: str) -> list[wire.Segment]:
    """Ids are taken as they are. A text's last state says more of the text once the text is known to have ended."""
    if not isinstance(given, str):
        return [wire.Ids(given)]
    end: list[wire.Segment] = [wire.Special("eos")] if pooling == "last" else []
    return [wire.Special("bos"), wire.Text(given), *end]


def _worded(index: int, values: bytes, encoding_format: str | None) -> bytes:
    if encoding_format == "base64":
        return generation.encode(schema.Embedding(index=index, embedding=values))
    numbers = list(struct.unpack(f"<{len(values) // 4}f", values))
    return generation.encode(schema.Embedding(index=index, embedding=numbers))
