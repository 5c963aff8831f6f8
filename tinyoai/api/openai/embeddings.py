"""POST /v1/embeddings: one vector for each text or list of token ids."""

import asyncio
import struct
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from tinyoai import errors, wire
from tinyoai.api import decode, generation
from tinyoai.api.decode import KeepAlive, Model, Natural, TokenId
from tinyoai.models.pool import Pool
from tinyoai.web.exchange import Exchange

if TYPE_CHECKING:
    from tinyoai.models.pool import Lease

MAX_INPUTS = 2048
BATCH = 16
"""Vectors to encode before other requests get a turn: some milliseconds for vectors of 4096 numbers."""


class EmbeddingRequest(Struct, kw_only=True):
    """The body of POST /v1/embeddings."""

    model: Model
    input: Annotated[
        str | list[str | TokenId | list[TokenId]],
        Meta(
            description="A text, several texts, token ids, or several lists of token ids; none may be empty."
        ),
    ]
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        Meta(description="`float`: numbers; `base64`: little-endian float32 values."),
    ] = None
    dimensions: Annotated[
        Natural | None, Meta(description="Keep this many numbers of each vector, scaled to length 1 again.")
    ] = None
    keep_alive: KeepAlive | None = None
    user: Annotated[str | None, Meta(description="Accepted, without effect.")] = None


class Embedding(Struct, kw_only=True):
    """The vector of one input: numbers, or little-endian float32 values in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | bytes


class EmbeddingUsage(Struct, kw_only=True):
    """Token counts of a request that generates nothing."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, kw_only=True):
    """The answer of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Embeddings:
    """The endpoint."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __call__(self, exchange: Exchange) -> None:
        """Answers one request. Raises errors.ApiError."""
        request = decode.decode(EmbeddingRequest, await exchange.read_body())
        given = inputs(request)
        async with self._pool.lease(request.model, decode.keep_alive(request.keep_alive)) as lease:
            await _answer(exchange, request, given, lease)


async def _answer(
    exchange: Exchange,
    request: EmbeddingRequest,
    given: Sequence[tuple[str, str | list[int]]],
    lease: "Lease",
) -> None:
    due = generation.deadline(exchange)
    await lease.ready(due)
    bodies = [
        wire.Embed(prompt=_prompt(item), dimensions=request.dimensions or 0, param=field)
        for field, item in given
    ]
    run = lease.run(bodies, client=exchange.client, scope=exchange.scope, deadline=due)
    parts: list[bytes | None] = [None] * len(bodies)
    n_prompt, n_done, queue_ms = 0, 0, 0.0
    async with aclosing(run) as events:
        async for index, event in events:
            if isinstance(event, wire.Accepted):
                queue_ms = max(queue_ms, event.queue_ms)
            elif isinstance(event, wire.Vector):
                parts[index] = _encode(index, event.values, request.encoding_format)
            elif isinstance(event, wire.Done):
                n_prompt += event.n_prompt
                exchange.n_tokens += event.n_prompt
                n_done += 1
                if n_done % BATCH == 0:
                    await asyncio.sleep(0)  # thousands of vectors at once would hold up all other requests
            elif isinstance(event, wire.Failed):
                raise generation.failure(event)
    data: list[Any] = [msgspec.Raw(part) for part in parts if part is not None]
    if not len(data) == n_done == len(bodies):
        raise errors.InternalError("the model's process returned fewer embeddings than requested")
    generation.add_queue_header(exchange, queue_ms)
    body = EmbeddingList(
        data=data,
        model=lease.name,
        usage=EmbeddingUsage(prompt_tokens=n_prompt, total_tokens=n_prompt),
    )
    exchange.respond(200, decode.encode(body))


def inputs(request: EmbeddingRequest) -> list[tuple[str, str | list[int]]]:
    """Returns the texts or token ids to embed, each with the path of its field. Raises errors.BadRequest."""
    found = decode.texts_or_ids(request.input, "input", MAX_INPUTS)
    single = isinstance(request.input, str) or isinstance(request.input[0], int)
    named = [("input" if single else f"input[{i}]", item) for i, item in enumerate(found)]
    for field, item in named:
        if not item:
            raise errors.BadRequest(f"{field}: must not be empty", param=field)
        if isinstance(item, str):
            decode.reject_nul(field, item)
    return named


def _prompt(given: str | list[int]) -> list[wire.Segment]:
    """Ids stay as they are."""
    return [wire.Special("bos"), wire.Text(given)] if isinstance(given, str) else [wire.Ids(given)]


def _encode(index: int, values: bytes, encoding_format: str | None) -> bytes:
    if encoding_format == "base64":
        return decode.encode(Embedding(index=index, embedding=values))
    numbers = list(struct.unpack(f"<{len(values) // 4}f", values))
    return decode.encode(Embedding(index=index, embedding=numbers))
