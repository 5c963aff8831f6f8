"""Runs generations: from wire bodies to a complete answer, or to a stream that a dialect encodes.

An answer to b prompts with n choices each has b * n choices; choice c of prompt p has the index p * n + c, and
indices first appear in ascending order. Each dialect brings a `StreamFormat` for its streams and reads an
`Answer` for everything else.
"""

import asyncio
import functools
import hashlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from tinyoai import errors, wire
from tinyoai.web import sse
from tinyoai.web.exchange import Exchange

if TYPE_CHECKING:
    from tinyoai.models.pool import Lease

PATIENCE_S = 10.0
"""Seconds from a request's head after which the stream of a waiting request begins without a result."""
SILENCE_S = 10.0
"""Seconds of silence in a stream after which a comment tells proxies and clients that it is alive."""
MARGIN, MIN_MARGIN_S, MAX_MARGIN_S = 0.1, 0.25, 5.0
"""A whole answer is due this share of the client's time limit before that limit, within these seconds."""
MAX_TIMEOUT_S = 1e6
"""A longer limit counts as none."""


# -- the state of an answer --------------------------------------------------------------------------


class Choice:
    """One choice of an answer. `texts` and `logprobs` stay empty in a stream."""

    __slots__ = ("done", "logprobs", "n_pieces", "prompt", "texts")

    def __init__(self, prompt: "Prompt") -> None:
        self.prompt = prompt
        self.texts: list[str] = []
        self.logprobs: list[wire.TokenLogprob] = []
        self.n_pieces = 0
        self.done: wire.ChoiceDone | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.texts)

    @property
    def finish_reason(self) -> wire.FinishReason:
        """The reason why it ended."""
        return self.end.finish_reason

    @property
    def end(self) -> wire.ChoiceDone:
        """Its ChoiceDone. An answer is only returned when each choice has one."""
        if self.done is None:
            raise errors.InternalError("a choice has not ended")
        return self.done


class Prompt:
    """One prompt of a request: counts in tokens, times in milliseconds."""

    __slots__ = ("ended", "n_cached", "n_prompt", "queue_ms")

    def __init__(self) -> None:
        self.n_prompt = 0
        self.n_cached = 0
        self.queue_ms = 0.0
        self.ended = False


class Answer:
    """The answer to a request: its prompts, and their choices in the order of their indices."""

    def __init__(self, n_prompts: int, n: int) -> None:
        """For prompts with n choices each."""
        self.n = n
        self.ready: wire.Ready
        """Set once the model is loaded."""
        self.prompts = [Prompt() for _ in range(n_prompts)]
        self.choices = [Choice(prompt) for prompt in self.prompts for _ in range(n)]
        self.waited = False
        """The response began before a slot was free, so no header has the wait."""

    @property
    def queue_ms(self) -> float:
        """The longest wait of a prompt for a slot."""
        return max(prompt.queue_ms for prompt in self.prompts)

    @property
    def n_prompt(self) -> int:
        """Tokens of all prompts. Each prompt counts once, however many choices it has."""
        return sum(prompt.n_prompt for prompt in self.prompts)

    @property
    def n_cached(self) -> int:
        """Tokens of all prompts that were in the KV cache."""
        return sum(prompt.n_cached for prompt in self.prompts)

    @property
    def n_generated(self) -> int:
        """Tokens of all choices."""
        return sum(choice.end.n_generated for choice in self.choices)

    def check(self) -> None:
        """Raises errors.InternalError unless every prompt and every choice has ended."""
        if not all(choice.prompt.ended and choice.done for choice in self.choices):
            raise errors.InternalError("the model's process ended an answer before it was complete")


# -- running it --------------------------------------------------------------------------------------


class _Run:
    """Runs one request, adds up the pieces of each choice, and keeps the exchange's cost up to date.

    The cost is charged when the exchange ends, however it ends. The tokens of a choice that is cut short are not
    known, but its pieces are.
    """

    def __init__(self, exchange: Exchange, bodies: Sequence[wire.Generate]) -> None:
        self.exchange = exchange
        self.bodies = bodies
        self.n = bodies[0].n
        self.answer = Answer(len(bodies), self.n)

    def on_event(self, index: int, event: wire.Event) -> bool:
        """Takes an event of a prompt straight out of the worker's frame. False: not now, it has to queue."""
        self.take(index, event)
        return True

    def flush(self) -> None:
        """No further event is at hand."""

    def content(self, prompt: int, event: wire.Content) -> None:
        """Takes a piece of a choice."""
        choice = self.answer.choices[prompt * self.n + event.choice]
        choice.n_pieces += 1
        self.exchange.n_tokens += 1
        choice.texts.append(event.text)
        choice.logprobs += event.logprobs

    def begin(self) -> None:
        """The model is loaded: `answer.ready` is set."""

    def queued(self) -> None:
        """The request is valid and waits for a slot."""

    def accepted(self, prompt: int) -> None:
        """A prompt has a slot."""

    def ended(self, index: int) -> None:
        """A choice is complete."""

    def take(self, prompt: int, event: wire.Event) -> None:
        """Takes any event. Raises the errors.ApiError that a Failed stands for."""
        state = self.answer.prompts[prompt]
        if isinstance(event, wire.Content):
            self.content(prompt, event)
        elif isinstance(event, wire.Queued):
            self.queued()
        elif isinstance(event, wire.Accepted):
            state.n_prompt, state.n_cached, state.queue_ms = event.n_prompt, event.n_cached, event.queue_ms
            self.exchange.n_tokens += event.n_prompt
            self.accepted(prompt)
        elif isinstance(event, wire.ChoiceDone):
            index = prompt * self.n + event.choice
            choice = self.answer.choices[index]
            choice.done = event
            self.exchange.n_tokens += event.n_generated - choice.n_pieces
            self.ended(index)
        elif isinstance(event, wire.Done):
            state.ended = True
        elif isinstance(event, wire.Failed):
            raise failure(event)

    async def complete(self, lease: "Lease", deadline: float | None, *, patient: bool) -> None:
        """Waits for the model and runs the bodies to their end. Raises errors.ApiError."""
        self.answer.ready = await lease.ready(deadline, patient=patient)
        self.begin()
        run = lease.run(
            self.bodies,
            client=self.exchange.client,
            scope=self.exchange.scope,
            deadline=deadline,
            sink=self,
        )
        async with aclosing(run) as events:
            async for prompt, event in events:
                self.take(prompt, event)
                self.flush()
                if self.exchange.congested:
                    await self.exchange.drain()
        self.answer.check()


async def fold(exchange: Exchange, lease: "Lease", bodies: Sequence[wire.Generate]) -> Answer:
    """Returns the whole answer and puts the wait into the header x-queue-ms. Raises errors.ApiError."""
    run = _Run(exchange, bodies)
    await run.complete(lease, deadline(exchange), patient=False)
    add_queue_header(exchange, run.answer.queue_ms)
    return run.answer


# -- streaming ---------------------------------------------------------------------------------------


class StreamFormat(ABC):
    """Encodes a stream in a dialect. Each bytes object becomes the data of one server-sent event."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    @abstractmethod
    def first(self, index: int) -> bytes | None:
        """Returns the event that opens a choice; None if the dialect has no such event."""

    @abstractmethod
    def content(self, index: int, event: wire.Content) -> bytes:
        """Returns the event of a piece of text."""

    @abstractmethod
    def last(self, index: int) -> bytes:
        """Returns the event that ends a choice."""

    @abstractmethod
    def end(self) -> Iterable[bytes]:
        """Returns the events that end a complete answer."""


async def stream(
    exchange: Exchange,
    lease: "Lease",
    bodies: Sequence[wire.Generate],
    make_format: Callable[[Answer], StreamFormat],
) -> None:
    """Streams the answer. Raises the errors.ApiError of what fails before the response has begun.

    `make_format` is called once the model is loaded. A later failure becomes an event that ends the stream.
    """
    run = _Stream(exchange, lease, bodies, make_format)
    try:
        await run.complete(lease, None, patient=True)
        run.finish()
    except errors.ApiError as error:
        if not run.open:
            raise
        exchange.fail(error)
    finally:
        run.close()


class _Stream(_Run):
    """Sends events as they come, and comments while nothing comes.

    The response begins with the first Accepted. It begins earlier once PATIENCE_S have passed and the request is
    queued or its model still loads: then the wait is in the answer's timings instead of a header.
    """

    def __init__(
        self,
        exchange: Exchange,
        lease: "Lease",
        bodies: Sequence[wire.Generate],
        make_format: Callable[[Answer], StreamFormat],
    ) -> None:
        super().__init__(exchange, bodies)
        self.open = False
        """The response has begun."""
        self._lease = lease
        self._make_format = make_format
        self._format: StreamFormat
        self._chunked = False
        self._is_queued = False
        # the order of the choices
        self._next = 0
        """The lowest index of which no event was sent yet."""
        self._held: dict[int, list[bytes]] = {}
        self._choices = self.answer.choices
        self._unsent: list[bytes] = []
        """Events that leave in the next write: those that arrive together are sent together."""
        # the wait and the comments
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._patience(), self._on_timer)

    def begin(self) -> None:
        self._format = self._make_format(self.answer)

    def queued(self) -> None:
        self._is_queued = True
        if self._patience() == 0.0:
            self._begin_response(early=True)

    def accepted(self, prompt: int) -> None:
        self._begin_response(early=False)
        for index in range(prompt * self.n, (prompt + 1) * self.n):
            data = self._format.first(index)
            if data is not None:
                self._send(index, data)

    def on_event(self, index: int, event: wire.Event) -> bool:
        exchange = self.exchange
        if exchange.congested:
            return False
        if type(event) is wire.Content and (at := index * self.n + event.choice) < self._next:
            # almost all are text of a choice that has appeared
            self._choices[at].n_pieces += 1
            exchange.n_tokens += 1
            self._unsent.append(sse.event(self._format.content(at, event), self._chunked))
        else:
            self.take(index, event)
        return True

    def content(self, prompt: int, event: wire.Content) -> None:
        index = prompt * self.n + event.choice
        self._choices[index].n_pieces += 1
        self.exchange.n_tokens += 1
        self._send(index, self._format.content(index, event))

    def flush(self) -> None:
        unsent = self._unsent
        if unsent:
            # one write of many events costs little more than one of a single event
            self.exchange.send(unsent[0] if len(unsent) == 1 else b"".join(unsent))
            unsent.clear()

    def ended(self, index: int) -> None:
        self._send(index, self._format.last(index))

    def finish(self) -> None:
        """Ends a complete answer."""
        self._unsent += [sse.event(data, self._chunked) for data in self._format.end()]
        self.flush()
        self.exchange.end_stream()

    def close(self) -> None:
        """Stops the comments."""
        self._timer.cancel()

    def _send(self, index: int, data: bytes) -> None:
        """Sends an event of a choice, or holds it until the choice before it has appeared."""
        if index > self._next:
            self._held.setdefault(index, []).append(data)
            return
        self._unsent.append(sse.event(data, self._chunked))
        if index == self._next:
            self._next += 1
            while held := self._held.pop(self._next, None):
                self._unsent += [sse.event(data, self._chunked) for data in held]
                self._next += 1

    def _begin_response(self, *, early: bool) -> None:
        if self.open:
            return
        self.answer.waited = early
        if not early:
            add_queue_header(self.exchange, self.answer.queue_ms)
        self.exchange.start_stream()
        self.open, self._chunked = True, self.exchange.chunked

    def _patience(self) -> float:
        """Seconds until the response may begin without an Accepted."""
        return max(0.0, PATIENCE_S - self.exchange.elapsed_ms / 1000.0)

    def _on_timer(self) -> None:
        if not self.open and (self._is_queued or self._lease.loading):
            self._begin_response(early=True)
        silent = 0.0
        if self.open:
            silent = self._loop.time() - self.exchange.last_sent
            if silent >= SILENCE_S:
                self.exchange.send(sse.comment("ping", self._chunked))
                silent = 0.0
        self._timer = self._loop.call_later(SILENCE_S - silent, self._on_timer)


# -- shared by all dialects -----------------------------------------------------------------------------


def failure(event: wire.Failed) -> errors.ApiError:
    """Returns the exception that a Failed stands for."""
    return errors.by_name(
        event.kind, event.message, param=event.param, code=event.code, retry_after=event.retry_after
    )


def add_queue_header(exchange: Exchange, queue_ms: float) -> None:
    """Puts the time that a request waited for a slot on the response."""
    exchange.extra_headers.append(("x-queue-ms", f"{queue_ms:.3f}"))


def deadline(exchange: Exchange) -> float | None:
    """Returns the loop time at which a whole answer is due; None if the client names no time limit.

    The SDKs send the seconds that they wait for an answer. It is due a margin earlier, counted from the request's
    head. Otherwise they disconnect, retry and join the end of the queue.
    """
    for name in (b"x-stainless-read-timeout", b"x-stainless-timeout"):
        try:
            limit = float(exchange.head.get(name) or b"")
        except ValueError:
            continue
        if 0.0 < limit < MAX_TIMEOUT_S:
            margin = min(MAX_MARGIN_S, max(MIN_MARGIN_S, MARGIN * limit))
            return asyncio.get_running_loop().time() - exchange.elapsed_ms / 1000.0 + max(0.0, limit - margin)
    return None


def fingerprint(ready: wire.Ready) -> str:
    """Returns the engine, its version and a hash, such as `fp_llamacpp-2026.10.11549_1a2b3c4d5e6f`.

    It changes when equal seeds may give other text: with the model, the engine or the sampler.
    """
    info = ready.info
    facts = (
        info.name,
        info.architecture,
        info.quantization,
        info.n_params,
        info.file_size,
        ready.version,
        *(f"{adapter.name}={adapter.scale}" for adapter in info.adapters),
    )
    engine = f"{info.engine}-{info.engine_version}".rstrip("-")
    return f"fp_{engine}_{_hash(facts)}"


@functools.lru_cache(maxsize=64)
def _hash(facts: tuple[str | int, ...]) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def new_id(prefix: str) -> str:
    """Returns a unique id such as `chatcmpl-...`."""
    return f"{prefix}-{secrets.token_hex(12)}"


def now() -> int:
    """Returns the wall clock in whole seconds, for fields such as `created`."""
    return int(time.time())
