"""Requests that a worker has not answered yet, and the rules of the protocol for each.

Each call ends in exactly one Done or Failed, whatever the worker sends: a message that breaks the rules raises
WireError, and the calls of a dead worker are failed here. Does no input or output.
"""

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from tinyoai import wire

log = logging.getLogger("tinyoai.worker")

Note = wire.Ready | wire.LoadFailed | wire.Heartbeat
"""A message that belongs to no call."""


class EventSink(Protocol):
    """Takes events of one or more calls as they arrive, all but Started, Done and Failed."""

    def on_event(self, index: int, event: wire.Event) -> bool:
        """Takes an event of the call with this index. Returns false if it must be queued instead."""

    def flush(self) -> None:
        """No further event is at hand: sends what was held back."""


class EventQueue:
    """Events of one or more calls in order of arrival, each with its call's index. Has one reader."""

    __slots__ = ("_waiter", "events")

    def __init__(self) -> None:
        self.events: deque[tuple[int, wire.Event]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, event: wire.Event) -> None:
        """Appends an event and wakes the reader."""
        self.events.append((index, event))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> tuple[int, wire.Event]:
        """Removes and returns the first event. Waits for one if there is none."""
        while not self.events:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.events.popleft()


class Stage(enum.IntEnum):
    """The progress of a call."""

    SENT = 0
    STARTED = 1
    QUEUED = 2
    ACCEPTED = 3


_Content = wire.Content
_ACCEPTED = Stage.ACCEPTED  # an enumeration's attributes are slow
_STAGES: dict[type, Stage] = {
    wire.Started: Stage.STARTED,
    wire.Queued: Stage.QUEUED,
    wire.Accepted: Stage.ACCEPTED,
}
_RESULTS: dict[type, type] = {
    wire.Embed: wire.Vector,
    wire.Rank: wire.Score,
    wire.Tokenize: wire.Tokens,
    wire.Detokenize: wire.PlainText,
}


class PendingCall:
    """One request at one worker."""

    __slots__ = (
        "choices",
        "ended",
        "id",
        "index",
        "needs_slot",
        "open_choices",
        "queue",
        "result",
        "sink",
        "stage",
    )

    def __init__(
        self, call_id: int, index: int, body: wire.Body, queue: EventQueue, sink: EventSink | None
    ) -> None:
        self.id = call_id
        self.index = index
        self.queue = queue
        self.sink = sink
        self.stage = Stage.SENT
        self.ended = False
        """The Done or Failed is in the queue."""
        self.needs_slot = isinstance(body, wire.NeedsSlot)
        self.open_choices = set(range(body.n)) if isinstance(body, wire.Generate) else set[int]()
        """Choices of a Generate whose ChoiceDone has not come."""
        self.choices: list[wire.ChoiceDone] = []
        """Those that have come."""
        self.result = _RESULTS.get(type(body))
        """The type of the one result that has not come; None for a Generate."""

    @property
    def started(self) -> bool:
        """The worker has begun work on it, so no other worker may get it."""
        return self.stage >= Stage.STARTED

    @property
    def accepted(self) -> bool:
        """It has a slot."""
        return self.stage is Stage.ACCEPTED

    def advance(self, event: wire.Event) -> None:
        """Notes an event other than Content. Raises wire.WireError, and changes nothing, if it may not come now."""
        kind, stage = type(event), self.stage
        if kind in _STAGES:
            if _STAGES[kind] != stage + 1 or (kind is wire.Queued and not self.needs_slot):
                raise self.breach(event)
            self.stage = _STAGES[kind]
        elif isinstance(event, wire.ChoiceDone):
            if stage is not Stage.ACCEPTED or event.choice not in self.open_choices:
                raise self.breach(event)
            self.open_choices.remove(event.choice)
            self.choices.append(event)
        elif kind is wire.Progress:
            if stage is not Stage.ACCEPTED:
                raise self.breach(event)
        elif kind is wire.Done:
            if self.open_choices or self.result is not None:
                raise self.breach(event)
        elif kind is not wire.Failed:
            if kind is not self.result or stage is not (Stage.ACCEPTED if self.needs_slot else Stage.STARTED):
                raise self.breach(event)
            self.result = None

    def breach(self, event: wire.Event) -> wire.WireError:
        """The error for an event that may not come now."""
        return wire.WireError(
            f"{type(event).__name__} of request {self.id} while it is {self.stage.name.lower()}"
        )


class PendingCalls:
    """The open calls of one worker, by id. Holds every message against the rules of the protocol."""

    def __init__(
        self, cancel: Callable[[PendingCall], None], on_busy: Callable[[], None] = lambda: None
    ) -> None:
        """`cancel` tells the worker to end a call that was failed on this side. `on_busy` hears when `busy` changes."""
        self.open: dict[int, PendingCall] = {}
        self._last_id = 0
        self._cancel = cancel
        self._on_busy = on_busy
        self._n_slotted = 0
        """Open calls that need a slot."""

    @property
    def busy(self) -> bool:
        """A call is open that needs a slot, and with it the processor."""
        return self._n_slotted > 0

    def begin(
        self, index: int, body: wire.Body, queue: EventQueue, sink: EventSink | None = None
    ) -> PendingCall:
        """Returns a new call with the next id. Its events go to `sink`, else to `queue` with `index`."""
        self._last_id += 1
        call = self.open[self._last_id] = PendingCall(self._last_id, index, body, queue, sink)
        self._count(call, 1)
        return call

    def receive(self, messages: Iterable[wire.ToServer]) -> list[Note]:
        """Hands the messages of one read to their calls, and returns those that belong to none.

        Raises wire.WireError for a message that breaks the rules; those before it are handed out.
        """
        calls = self.open
        notes: list[Note] = []
        taken: dict[PendingCall, EventSink] = {}
        try:
            for message in messages:
                if type(message) is not _Content and isinstance(message, Note):
                    notes.append(message)
                    continue
                call = calls.get(message.id)
                if call is None:
                    self._check_ended(message)
                    continue
                if type(message) is _Content:  # almost all are, and isinstance takes three times as long
                    if call.stage is not _ACCEPTED or message.choice not in call.open_choices:
                        raise call.breach(message)
                else:
                    call.advance(message)
                    if isinstance(message, wire.Final):
                        self._end(call, message)
                        continue
                    if type(message) is wire.Started and call.sink is not None:
                        continue
                sink = call.sink
                if sink is not None and not call.queue.events:  # nothing may overtake what is queued
                    try:
                        if sink.on_event(call.index, message):
                            taken[call] = sink
                            continue
                    except Exception:
                        self._on_fault(call)
                        continue
                call.queue.put(call.index, message)
        finally:
            for call, sink in taken.items():
                try:
                    sink.flush()
                except Exception:
                    self._on_fault(call)
        return notes

    def fail(self, call: PendingCall, kind: str, message: str) -> None:
        """Ends one call from this side. Harmless if it has ended."""
        if not call.ended:
            self._end(call, wire.Failed(id=call.id, kind=kind, message=message))

    def fail_all(self, kind: str, message: str) -> None:
        """Ends every open call."""
        for call in list(self.open.values()):
            self.fail(call, kind, message)

    def _check_ended(self, event: wire.Event) -> None:
        """Raises wire.WireError unless the event's call has ended on this side: the worker may not know that yet."""
        if not 0 < event.id <= self._last_id:
            raise wire.WireError(f"{type(event).__name__} of request {event.id}, which was never sent")

    def _end(self, call: PendingCall, final: wire.Final) -> None:
        del self.open[call.id]
        call.ended = True
        call.queue.put(call.index, final)
        self._count(call, -1)

    def _count(self, call: PendingCall, change: int) -> None:
        if call.needs_slot:
            before = self.busy
            self._n_slotted += change
            if self.busy is not before:
                self._on_busy()

    def _on_fault(self, call: PendingCall) -> None:
        # one stream's fault must not end the connection that all requests of the model share
        log.exception("request %d: its answer could not be passed on", call.id)
        self.fail(call, "InternalError", "the answer could not be passed on; see the server's log")
        self._cancel(call)
