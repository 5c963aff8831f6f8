"""From a worker's events to an answer's parts: merging, folding, counting, streaming.

Owns what both completion endpoints share: one event stream per choice, all merged in order of first
appearance; an unstreamed answer is a fold over the same events. It must not know prompts or
templates, nor how tokens are made.
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
from tinyoai.models.pool import Lease
from tinyoai.models.worker import Take
from tinyoai.web import sse
from tinyoai.web.exchange import Exchange

PING_S = 15.0
"""Seconds of silence in a stream after which a comment keeps proxies awake."""

MARGIN, MIN_MARGIN_S, MAX_MARGIN_S = 0.1, 0.25, 5.0
"""How much earlier than the client's time limit an unstreamed answer ends: a tenth, within these seconds."""
MAX_TIMEOUT_S = 1e6
"""A longer limit is none."""

Make = Callable[[int], wire.Generate]
Indexed = tuple[int, wire.Good]

encode = msgspec.json.Encoder().encode


# -- many streams as one -----------------------------------------------------------------------------


async def events(
    lease: Lease, makes: Sequence[Make], take: Take | None = None
) -> AsyncGenerator[Indexed, None]:
    """All choices' events, each with its index; indices first appear in ascending order.

    Of an only choice `take` may take pieces as they come in. Raises the errors.ApiError that a Failed
    stands for. Closing the generator cancels what runs.
    """
    if len(makes) == 1:
        async with aclosing(lease.call(makes[0], take)) as stream:
            async for event in stream:
                yield 0, good(event)
        return
    queue: asyncio.Queue[tuple[int, wire.Event | BaseException | None]] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async with aclosing(lease.call(makes[index])) as stream:
                async for event in stream:
                    queue.put_nowait((index, event))
        except errors.ApiError as error:
            queue.put_nowait((index, error))
        finally:
            queue.put_nowait((index, None))

    tasks = [asyncio.create_task(pump(index)) for index in range(len(makes))]
    early: dict[int, list[wire.Good]] = {}
    n_seen, n_ended = 0, 0
    try:
        while n_ended < len(tasks):
            index, said = await queue.get()
            if said is None:
                n_ended += 1
                continue
            if isinstance(said, BaseException):
                raise said
            event = good(said)
            if index > n_seen:
                early.setdefault(index, []).append(event)
                continue
            yield index, event
            held = [event] if index == n_seen else []
            # an Accepted is no appearance: at an endpoint that opens no choice, clients see nothing of it
            while any(not isinstance(event, wire.Accepted) for event in held):
                n_seen += 1
                held = early.pop(n_seen, [])
                for event in held:
                    yield n_seen, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def good(event: wire.Event) -> wire.Good:
    """The event, unless it is a failure. Raises the errors.ApiError that a Failed stands for."""
    if isinstance(event, wire.Failed):
        raise errors.by_name(
            event.kind, event.message, param=event.param, code=event.code, retry_after=event.retry_after
        )
    return event


# -- what an answer is made of -------------------------------------------------------------------------


class Folded:
    """One choice, added up from its events."""

    __slots__ = ("done", "logprobs", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.logprobs: list[wire.TokenLogprob] = []
        self.done: wire.Done | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(self.texts)

    @property
    def finish_reason(self) -> wire.FinishReason:
        """Why it ended."""
        return self.done.finish_reason if self.done else "stop"

    def add(self, event: wire.Good) -> None:
        """One more event."""
        if isinstance(event, wire.Delta):
            self.texts.append(event.text)
            self.logprobs += event.logprobs
        elif isinstance(event, wire.Done):
            self.done = event


class Meter:
    """Keeps an exchange's cost true at any time, since it is charged when the exchange ends, however it does.

    Of an answer that is cut short the tokens are not known, but its pieces are.
    """

    __slots__ = ("_exchange", "_pieces")

    def __init__(self, exchange: Exchange, n: int) -> None:
        """For `n` choices."""
        self._exchange = exchange
        self._pieces = [0] * n

    def piece(self, index: int) -> None:
        """A piece of a choice has come."""
        self._pieces[index] += 1
        self._exchange.n_tokens += 1

    def end(self, index: int, done: wire.Done) -> None:
        """A choice is complete: what it cost is known."""
        self._exchange.n_tokens += done.n_generated - self._pieces[index]


async def fold(exchange: Exchange, source: AsyncGenerator[Indexed, None], n: int) -> list[Folded]:
    """The choices, whole. Raises errors.ApiError as the source does."""
    folded = [Folded() for _ in range(n)]
    meter = Meter(exchange, n)
    waited: float | None = None
    async with aclosing(source):
        async for index, event in source:
            folded[index].add(event)
            if isinstance(event, wire.Delta):
                meter.piece(index)
            elif isinstance(event, wire.Accepted):
                exchange.n_tokens += event.n_prompt
                waited = max(waited or 0.0, event.queue_ms)
            elif isinstance(event, wire.Done):
                meter.end(index, event)
    if waited is not None:
        tell_wait(exchange, waited)
    return folded


def tell_wait(exchange: Exchange, queue_ms: float) -> None:
    """How long the request stood in the line, on the answer."""
    exchange.extra_headers.append(("x-queue-ms", f"{queue_ms:.3f}"))


def standing(exchange: Exchange, *, streamed: bool) -> dict[str, Any]:
    """What a question to a worker says of who asks: client, group and deadline_s.

    An unstreamed answer is due shortly before the client stops listening; the SDKs tell when that is.
    """
    # not the request's id, which the client may choose: all of one id would be one in the line
    found: dict[str, Any] = {"client": exchange.client, "group": new_id("group")}
    limit = None if streamed else _read_timeout(exchange)
    if limit is not None:
        margin = min(MAX_MARGIN_S, max(MIN_MARGIN_S, MARGIN * limit))
        found["deadline_s"] = max(0.0, limit - margin - exchange.elapsed_ms / 1000.0)
    return found


def _read_timeout(exchange: Exchange) -> float | None:
    """The client's own time limit in seconds, as the Python and the Node SDK tell it."""
    for name in (b"x-stainless-read-timeout", b"x-stainless-timeout"):
        try:
            limit = float(exchange.head.get(name) or b"")
        except ValueError:
            continue
        if 0.0 < limit < MAX_TIMEOUT_S:
            return limit
    return None


def usage(dones: Sequence[wire.Done], per_prompt: int) -> schema.Usage:
    """The counts of one request with `per_prompt` choices for each prompt: a prompt counts once."""
    prompts = dones[::per_prompt]
    n_prompt = sum(done.n_prompt for done in prompts)
    n_generated = sum(done.n_generated for done in dones)
    return schema.Usage(
        prompt_tokens=n_prompt,
        completion_tokens=n_generated,
        total_tokens=n_prompt + n_generated,
        prompt_tokens_details=schema.PromptTokensDetails(
            cached_tokens=sum(done.n_cached for done in prompts)
        ),
    )


def timings(dones: Sequence[wire.Done]) -> schema.Timings:
    """Times and speeds over all choices: milliseconds, and tokens a second."""
    n_cached = sum(done.n_cached for done in dones)
    n_prompt = sum(done.n_prompt for done in dones) - n_cached
    n_generated = sum(done.n_generated for done in dones)
    prompt_ms = sum(done.prompt_ms for done in dones)
    predicted_ms = sum(done.predicted_ms for done in dones)
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
    )


def _rate(count: int, milliseconds: float) -> float:
    return count / milliseconds * 1000.0 if milliseconds > 0 else 0.0


def fingerprint(ready: wire.Ready) -> str:
    """Changes when equal seeds may give other text: with the model, its engine or the sampler."""
    what = (
        ready.name,
        ready.architecture,
        ready.quantization,
        ready.n_params,
        ready.file_size,
        ready.version,
    )
    return "fp_" + hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def new_id(prefix: str) -> str:
    """A unique id such as `chatcmpl-...`."""
    return f"{prefix}-{secrets.token_hex(12)}"


def now() -> int:
    """The wall clock in whole seconds, for `created` and nothing else."""
    return int(time.time())


def text(piece: bytes) -> str:
    """A token's bytes as text; what is no code point by itself becomes U+FFFD."""
    return piece.decode("utf-8", "replace")


# -- sampling ------------------------------------------------------------------------------------------


def sampling(request: schema.Generation) -> wire.Sampling:
    """What the client asked for, over OpenAI's defaults; without a seed, a fresh one."""
    seed = secrets.randbits(63) if request.seed is None else request.seed & (2**64 - 1)

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    return wire.Sampling(
        temperature=given(request.temperature, 1.0),
        top_k=max(0, request.top_k or 0),
        top_p=given(request.top_p, 1.0),
        min_p=given(request.min_p, 0.0),
        repeat_penalty=given(request.repeat_penalty, 1.0),
        presence_penalty=given(request.presence_penalty, 0.0),
        frequency_penalty=given(request.frequency_penalty, 0.0),
        logit_bias=schema.logit_bias(request),
        seed=seed,
    )


def repeatable(request: schema.Generation) -> bool:
    """Whether the client may expect the same answer again."""
    return request.seed is not None or request.temperature == 0


def seeded(base: wire.Sampling, index: int) -> wire.Sampling:
    """The same for choice `index`: every choice draws from a seed of its own."""
    return structs.replace(base, seed=(base.seed + index) & (2**64 - 1)) if index else base


# -- streaming -----------------------------------------------------------------------------------------


Chunk = TypeVar("Chunk", schema.ChatChunk, schema.Completion)


class Chunks(ABC, Generic[Chunk]):
    """How an endpoint words its stream; `blank` is a chunk with all that every chunk says, and no choice."""

    def __init__(self, blank: Chunk, options: schema.StreamOptions | None, per_prompt: int) -> None:
        self._with_usage = bool(options and options.include_usage)
        self._blank: Chunk = structs.replace(blank, usage=None) if self._with_usage else blank
        self._per_prompt = per_prompt

    @abstractmethod
    def first(self, index: int) -> bytes | None:
        """The chunk that opens a choice, if the endpoint has one."""

    @abstractmethod
    def delta(self, index: int, event: wire.Delta) -> bytes:
        """A chunk of text."""

    @abstractmethod
    def last(self, index: int, done: wire.Done) -> bytes:
        """The chunk that ends a choice."""

    def counts(self, dones: Sequence[wire.Done]) -> bytes | None:
        """The usage chunk, if it was asked for."""
        if not self._with_usage:
            return None
        return self._worded([], usage=usage(dones, self._per_prompt), timings=timings(dones))

    def _worded(self, choices: list[Any], **more: Any) -> bytes:
        return encode(structs.replace(self._blank, choices=choices, **more))


async def stream(exchange: Exchange, lease: Lease, makes: Sequence[Make], chunks: Chunks[Any]) -> None:
    """Sends events as they come. A failure before the first is raised, later it is an error event."""
    dones: dict[int, wire.Done] = {}
    meter = Meter(exchange, len(makes))
    chunked = False
    ping: _Ping | None = None

    count, delta, send = meter.piece, chunks.delta, exchange.send

    def take(event: wire.Delta) -> bool:
        """The short way for almost every token: out of the worker's frame and into the socket."""
        if ping is None or exchange.congested:
            return False
        count(0)
        send(sse.event(delta(0, event), chunked))
        return True

    try:
        async with aclosing(events(lease, makes, take)) as source:
            async for index, event in source:
                if isinstance(event, wire.Delta):
                    meter.piece(index)
                    exchange.send(sse.event(chunks.delta(index, event), chunked))
                    if exchange.congested:
                        await exchange.drain()
                    continue
                if isinstance(event, wire.Accepted):
                    exchange.n_tokens += event.n_prompt
                    if ping is None:
                        tell_wait(exchange, event.queue_ms)
                        exchange.start_stream()
                        chunked = exchange.chunked
                    data = chunks.first(index)
                elif isinstance(event, wire.Done):
                    dones[index] = event
                    meter.end(index, event)
                    data = chunks.last(index, event)
                else:
                    continue
                if data is not None:
                    exchange.send(sse.event(data, chunked))
                ping = ping or _Ping(exchange, chunked)
        data = chunks.counts([dones[index] for index in sorted(dones)])
        if data is not None:
            exchange.send(sse.event(data, chunked))
        exchange.send(sse.done(chunked))
        exchange.end_stream()
    except errors.ApiError as error:
        if ping is None:
            raise
        exchange.fail(error)
    finally:
        if ping is not None:
            ping.stop()


class _Ping:
    """Sends a comment whenever a stream was silent for PING_S; one timer, not one for each event."""

    def __init__(self, exchange: Exchange, chunked: bool) -> None:
        self._exchange = exchange
        self._comment = sse.comment("ping", chunked)
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(PING_S, self._fire)

    def stop(self) -> None:
        self._timer.cancel()

    def _fire(self) -> None:
        silent = self._loop.time() - self._exchange.last_sent
        if silent >= PING_S:
            self._exchange.send(self._comment)
            silent = 0.0
        self._timer = self._loop.call_later(PING_S - silent, self._fire)
