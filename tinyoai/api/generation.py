"""The neutral core of generation: run requests, fold or stream their choices, meter tokens.

A dialect gives bodies and a StreamFormat; it gets events by choice. Choice indices first appear in ascending
order. An unstreamed answer is a fold over the same events that a stream sends.
"""

import asyncio
import hashlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import structs

from tinyoai import errors, wire
from tinyoai.api import schema
from tinyoai.models.lease import Lease
from tinyoai.web import sse
from tinyoai.web.exchange import Exchange

KEEPALIVE_S = 10.0
"""Seconds after which a stream that waits sends its head, and of silence after which it sends a comment."""
MARGIN, MIN_MARGIN_S, MAX_MARGIN_S = 0.1, 0.25, 5.0
"""How much earlier than the client's read timeout an unstreamed answer ends: a tenth, within these seconds."""
MAX_TIMEOUT_S = 1e6
"""A longer read timeout counts as none."""

encode = msgspec.json.Encoder().encode


# -- events ------------------------------------------------------------------------------------------


def raise_if_failed(event: wire.Event) -> wire.Success:
    """The event, unless it is a failure. Raises the errors.ApiError that a Failed stands for."""
    if isinstance(event, wire.Failed):
        raise errors.by_name(
            event.kind, event.message, param=event.param, code=event.code, retry_after=event.retry_after
        )
    return event


async def in_order(
    source: AsyncGenerator[tuple[int, wire.Event], None], n: int
) -> AsyncGenerator[tuple[int, wire.Success], None]:
    """Events with their choice, `n` for each body; a choice first appears after the one before it.

    Events of a whole request come with the index of its first choice. Raises errors.ApiError for a Failed.
    """
    early: dict[int, list[wire.Success]] = {}
    n_seen = 0
    async with aclosing(source):
        async for body, event in source:
            event = raise_if_failed(event)
            if not isinstance(event, wire.Content | wire.ChoiceDone):
                yield body * n, event
                continue
            index = body * n + event.choice
            if index > n_seen:
                early.setdefault(index, []).append(event)
                continue
            yield index, event
            while index == n_seen:
                n_seen += 1
                for held in early.pop(n_seen, ()):
                    index = n_seen
                    yield n_seen, held


# -- choices -----------------------------------------------------------------------------------------


class Choice:
    """One choice, folded from its events."""

    __slots__ = ("done", "logprobs", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.logprobs: list[wire.TokenLogprob] = []
        self.done: wire.ChoiceDone | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(self.texts)

    @property
    def finish_reason(self) -> wire.FinishReason:
        """Why it ended. Raises errors.InternalError if it never did."""
        return self.end.finish_reason

    @property
    def end(self) -> wire.ChoiceDone:
        """Its ChoiceDone. Raises errors.InternalError if it never came."""
        if self.done is None:
            raise errors.InternalError("the model's process left an answer unfinished")
        return self.done


class Totals:
    """The counts of a request: for each body its Accepted, for each choice its ChoiceDone."""

    def __init__(self, n: int) -> None:
        self._n = n
        self.accepted: dict[int, wire.Accepted] = {}
        self.dones: dict[int, wire.ChoiceDone] = {}

    @property
    def queue_ms(self) -> float:
        """The longest wait of its parts."""
        return max((accepted.queue_ms for accepted in self.accepted.values()), default=0.0)

    def n_prompt(self, index: int) -> int:
        """Prompt tokens of a choice."""
        return self.accepted[index - index % self._n].n_prompt


class Meter:
    """Keeps an exchange's cost true at any time, since it is charged when the exchange ends, however it does.

    Of an answer that is cut short the number of tokens is not known, but that of its pieces is.
    """

    __slots__ = ("_exchange", "_pieces")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._pieces: dict[int, int] = {}

    def piece(self, index: int) -> None:
        """Counts a piece of a choice."""
        self._pieces[index] = self._pieces.get(index, 0) + 1
        self._exchange.n_tokens += 1

    def end(self, index: int, done: wire.ChoiceDone) -> None:
        """Counts a complete choice."""
        self._exchange.n_tokens += done.n_generated - self._pieces.get(index, 0)


async def fold(
    exchange: Exchange, source: AsyncGenerator[tuple[int, wire.Success], None], n_bodies: int, n: int
) -> tuple[list[Choice], Totals]:
    """The choices, whole. Raises errors.ApiError as the source does."""
    choices = [Choice() for _ in range(n_bodies * n)]
    meter, totals = Meter(exchange), Totals(n)
    async with aclosing(source):
        async for index, event in source:
            if isinstance(event, wire.Content):
                choices[index].texts.append(event.text)
                choices[index].logprobs += event.logprobs
                meter.piece(index)
            elif isinstance(event, wire.Accepted):
                totals.accepted[index] = event
                exchange.n_tokens += event.n_prompt
            elif isinstance(event, wire.ChoiceDone):
                choices[index].done = totals.dones[index] = event
                meter.end(index, event)
    for choice in choices:
        assert choice.end
    add_queue_header(exchange, totals.queue_ms)
    return choices, totals


def add_queue_header(exchange: Exchange, queue_ms: float) -> None:
    """The wait for a slot, on the answer."""
    exchange.extra_headers.append(("x-queue-ms", f"{queue_ms:.3f}"))


def queue_fields(exchange: Exchange, *, streamed: bool) -> dict[str, Any]:
    """The arguments of Lease.run that place a request in the queue: client, group and deadline.

    An unstreamed answer is due shortly before the client's read timeout, which the SDKs send.
    """
    # not the request's id, which the client may choose: all requests of one id would count as one
    fields: dict[str, Any] = {"client": exchange.client, "group": new_id("group")}
    limit = None if streamed else _read_timeout(exchange)
    if limit is not None:
        margin = min(MAX_MARGIN_S, max(MIN_MARGIN_S, MARGIN * limit))
        now = asyncio.get_running_loop().time()
        fields["deadline"] = now - exchange.elapsed_ms / 1000.0 + max(0.0, limit - margin)
    return fields


def _read_timeout(exchange: Exchange) -> float | None:
    """The client's read timeout in seconds, from the headers of the Python and Node SDKs."""
    for name in (b"x-stainless-read-timeout", b"x-stainless-timeout"):
        try:
            limit = float(exchange.head.get(name) or b"")
        except ValueError:
            continue
        if 0.0 < limit < MAX_TIMEOUT_S:
            return limit
    return None


def usage(totals: Totals, per_prompt: int) -> schema.Usage:
    """The counts of one request: a prompt counts once, whatever its choices."""
    n_prompt = sum(accepted.n_prompt for accepted in totals.accepted.values())
    n_generated = sum(done.n_generated for done in totals.dones.values())
    return schema.Usage(
        prompt_tokens=n_prompt,
        completion_tokens=n_generated,
        total_tokens=n_prompt + n_generated,
        prompt_tokens_details=schema.PromptTokensDetails(
            cached_tokens=sum(accepted.n_cached for accepted in totals.accepted.values())
        ),
    )


def timings(
    totals: Totals, indices: Sequence[int] | None = None, queue_ms: float | None = None
) -> schema.Timings:
    """Times and speeds over choices: milliseconds, and tokens per second."""
    dones = {i: totals.dones[i] for i in (totals.dones if indices is None else indices)}
    n_cached = sum(done.n_cached for done in dones.values())
    n_prompt = sum(totals.n_prompt(i) for i in dones) - n_cached
    n_generated = sum(done.n_generated for done in dones.values())
    prompt_ms = sum(done.prompt_ms for done in dones.values())
    predicted_ms = sum(done.predicted_ms for done in dones.values())
    return schema.Timings(
        cache_n=n_cached,
        prompt_n=n_prompt,
        prompt_ms=prompt_ms,
        prompt_per_token_ms=prompt_ms / max(1, n_prompt),
        prompt_per_second=_rate(n_prompt, prompt_ms),
        predicted_n=n_generated,
        predicted_ms=predicted_ms,
        predicted_per_token_ms=predicted_ms / max(1, n_generated),
        predicted_per_second=_rate(n_generated, predicted_ms),
        queue_ms=msgspec.UNSET if queue_ms is None else queue_ms,
    )


def _rate(count: int, milliseconds: float) -> float:
    return count / milliseconds * 1000.0 if milliseconds > 0 else 0.0


def fingerprint(ready: wire.Ready) -> str:
    """A hash that changes when equal seeds may give other text: with the model, its engine or the sampler."""
    info = ready.info
    what = (
        info.name,
        info.architecture,
        info.quantization,
        info.n_params,
        info.file_size,
        ready.version,
    )
    return "fp_" + hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def new_id(prefix: str) -> str:
    """A unique id such as `chatcmpl-...`."""
    return f"{prefix}-{secrets.token_hex(12)}"


def now() -> int:
    """Unix time in whole seconds."""
    return int(time.time())


def text(piece: bytes) -> str:
    """A token's bytes as text; a part of a code point becomes U+FFFD."""
    return piece.decode("utf-8", "replace")


# -- sampling ----------------------------------------------------------------------------------------


def seed(request: schema.Generation) -> int:
    """The client's seed as an unsigned number, else a fresh one."""
    return secrets.randbits(63) if request.seed is None else request.seed & (2**64 - 1)


def repeatable(request: schema.Generation) -> bool:
    """Whether the client may expect the same answer again."""
    return request.seed is not None or request.temperature == 0


# -- streaming ---------------------------------------------------------------------------------------


Chunk = TypeVar("Chunk", schema.ChatChunk, schema.Completion)


class StreamFormat(ABC, Generic[Chunk]):
    """How a dialect writes its stream. `blank` is a chunk without choices."""

    def __init__(self, blank: Chunk, options: schema.StreamOptions | None) -> None:
        self._with_usage = bool(options and options.include_usage)
        self._blank: Chunk = structs.replace(blank, usage=None) if self._with_usage else blank

    def with_fingerprint(self, ready: wire.Ready) -> None:
        """Completes the chunks with facts of the loaded model."""
        self._blank = structs.replace(self._blank, system_fingerprint=fingerprint(ready))

    @abstractmethod
    def first(self, index: int) -> bytes | None:
        """The chunk that opens a choice, if the dialect has one."""

    @abstractmethod
    def content(self, index: int, event: wire.Content) -> bytes:
        """A chunk of text."""

    @abstractmethod
    def last(self, index: int, done: wire.ChoiceDone, times: schema.Timings) -> bytes:
        """The chunk that ends a choice."""

    def counts(self, totals: Totals, per_prompt: int, queue_ms: float | None) -> bytes | None:
        """The usage chunk, if it was asked for."""
        if not self._with_usage:
            return None
        return self._encode_chunk(
            [], usage=usage(totals, per_prompt), timings=timings(totals, queue_ms=queue_ms)
        )

    def _encode_chunk(self, choices: list[Any], **more: Any) -> bytes:
        return encode(structs.replace(self._blank, choices=choices, **more))


async def stream(
    exchange: Exchange,
    lease: Lease,
    bodies: Sequence[wire.Body],
    n: int,
    chunks: StreamFormat[Any],
) -> None:
    """Sends events as they come. A failure before the head is raised, later it is an error event.

    The head leaves with the first Accepted, or after KEEPALIVE_S if the prompt is queued or the model still loads.
    """
    totals, meter = Totals(n), Meter(exchange)
    head = _Head(exchange, lambda: totals_queued or lease.loading)
    totals_queued: list[int] = []
    opened: set[int] = set()
    only = [False]

    def write(data: bytes | None) -> None:
        if data is not None:
            exchange.send(sse.event(data, exchange.chunked))

    def on_text(index: int, event: wire.Content) -> None:
        meter.piece(index)
        write(chunks.content(index, event))

    def on_content(body: int, event: wire.Content) -> bool:
        """The short path of almost every token: from the worker's frame into the socket."""
        if not only[0] or exchange.congested:
            return False
        on_text(0, event)
        return True

    try:
        chunks.with_fingerprint(await lease.ready(patient=True))
        source = lease.run(bodies, **queue_fields(exchange, streamed=True), on_content=on_content)
        async with aclosing(in_order(source, n)) as events:
            async for index, event in events:
                if isinstance(event, wire.Content):
                    if index not in opened:
                        opened.add(index)
                        write(chunks.first(index))
                    on_text(index, event)
                    if exchange.congested:
                        await exchange.drain()
                elif isinstance(event, wire.Queued):
                    totals_queued.append(index)
                elif isinstance(event, wire.Accepted):
                    totals.accepted[index] = event
                    exchange.n_tokens += event.n_prompt
                    head.send(event.queue_ms)
                    if n == len(bodies) == 1:
                        opened.add(0)
                        write(chunks.first(0))
                        only[0] = True
                elif isinstance(event, wire.ChoiceDone):
                    if index not in opened:
                        opened.add(index)
                        write(chunks.first(index))
                    totals.dones[index] = event
                    meter.end(index, event)
                    waited = totals.queue_ms if head.early else None
                    write(chunks.last(index, event, timings(totals, [index], waited)))
        if len(totals.dones) != n * len(bodies):
            raise errors.InternalError("the model's process left an answer unfinished")
        write(chunks.counts(totals, n, totals.queue_ms if head.early else None))
        exchange.send(sse.done(exchange.chunked))
        exchange.end_stream()
    except errors.ApiError as error:
        if not exchange.status:
            raise
        exchange.fail(error)
    finally:
        head.stop()


class _Head:
    """Sends a stream's head, and comments while it is silent; one timer, not one for each event."""

    def __init__(self, exchange: Exchange, waits: Callable[[], Any]) -> None:
        self._exchange = exchange
        self._waits = waits
        self._loop = asyncio.get_running_loop()
        self._sent = False
        self.early = False
        """It left before the request had a slot."""
        self._timer = self._loop.call_later(KEEPALIVE_S - exchange.elapsed_ms / 1000.0, self._fire)

    def send(self, queue_ms: float) -> None:
        """The request has a slot: the head leaves, if it has not."""
        if not self._sent:
            add_queue_header(self._exchange, queue_ms)
            self._start()

    def stop(self) -> None:
        """Sends no more comments."""
        self._timer.cancel()

    def _start(self) -> None:
        self._sent = True
        self._exchange.start_stream()

    def _fire(self) -> None:
        after = KEEPALIVE_S
        if not self._sent:
            if self._waits():
                self.early = True
                self._start()
                self._comment()
            else:
                after = 1.0
        else:
            silent = self._loop.time() - self._exchange.last_sent
            if silent >= KEEPALIVE_S:
                self._comment()
                silent = 0.0
            after = KEEPALIVE_S - silent
        self._timer = self._loop.call_later(after, self._fire)

    def _comment(self) -> None:
        self._exchange.send(sse.comment("ping", self._exchange.chunked))
