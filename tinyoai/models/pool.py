"""Which models run, and that they keep running.

Owns one entry per known model: its worker, its state, its deaths. `verdict` decides and has no
clock, no process and no await; `Pool` carries out. It knows neither HTTP nor a request's contents.

    loading ──Ready──▶ ready ──death──▶ waiting ──back-off──▶ loading
       └──refused──▶ failed ◀──third death in a minute──┘      (a failed one is tried anew
                       └───────────after COOL_S, on request──────────▶ loading)
"""

import asyncio
import enum
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

from tinyoai import errors, wire
from tinyoai.models.worker import Call, LoadError, Make, Worker

log = logging.getLogger("tinyoai.pool")

DEATHS = 3
WINDOW_S = 60.0
"""So many deaths in so many seconds, and the model counts as failed."""
COOL_S = 60.0
"""Seconds a failed model is left alone before a request may try it again."""
FIRST_DELAY_S, LAST_DELAY_S = 0.2, 5.0
"""Back-off before a restart: the first, and the longest."""
WAIT_S = 30.0
"""Seconds that a request waits for a model that is on its way."""


class State(enum.Enum):
    """Where a model is."""

    LOADING = "loading"
    READY = "ready"
    WAITING = "waiting"
    FAILED = "failed"
    UNLOADED = "unloaded"


def verdict(deaths: Sequence[float], now: float) -> tuple[State, float]:
    """What follows a death: the next state, and the seconds to stay in it."""
    recent = sum(1 for died in deaths if now - died < WINDOW_S)
    if recent >= DEATHS:
        return State.FAILED, COOL_S
    return State.WAITING, min(LAST_DELAY_S, FIRST_DELAY_S * 5.0 ** max(0, recent - 1))


class Entry:
    """One model that is known by name."""

    __slots__ = (
        "changed",
        "created",
        "deaths",
        "load",
        "retry_at",
        "state",
        "task",
        "timeout",
        "uses",
        "why",
        "worker",
    )

    def __init__(self, load: wire.Load, created: int, timeout: float) -> None:
        # what it is
        self.load = load
        self.created = created
        self.timeout = timeout
        # how it is
        self.state = State.UNLOADED
        self.why = ""
        self.worker: Worker | None = None
        self.uses = 0
        self.deaths: deque[float] = deque(maxlen=DEATHS)
        self.retry_at = 0.0
        self.changed = asyncio.Event()
        """Set, and replaced by a new one, at every change of state."""
        self.task: asyncio.Task[None] | None = None


class Pool:
    """All models of this server."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def add(self, load: wire.Load, *, created: int, timeout: float) -> None:
        """Makes a model known; `timeout` is for its load, in seconds."""
        self._entries[load.name] = Entry(load, created, timeout)

    @property
    def entries(self) -> list[Entry]:
        """All known models, in the order in which they were added."""
        return list(self._entries.values())

    def find(self, name: str) -> Entry:
        """Raises errors.ModelNotFound, naming what there is."""
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(repr(n) for n in self._entries) or "none"
            raise errors.ModelNotFound(f"there is no model {name!r} here; there is {known}", param="model")
        return entry

    async def load(self, name: str) -> Worker:
        """The model's worker, started if need be. Raises errors.Unavailable and its kinds."""
        entry = self.find(name)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_S
        while entry.state is not State.READY or entry.worker is None or not entry.worker.alive:
            if entry.state is State.FAILED and loop.time() < entry.retry_at:
                raise errors.ModelFailed(f"the model {name!r} cannot be kept up: {entry.why}")
            if entry.task is None:
                entry.task = loop.create_task(self._keep(entry))
            changed = entry.changed
            try:
                await asyncio.wait_for(changed.wait(), deadline - loop.time())
            except TimeoutError:
                raise errors.ModelLoading(f"the model {name!r} is still loading; try again soon") from None
        return entry.worker

    async def first_load(self, name: str) -> wire.Ready:
        """Loads a model and waits as long as that takes. Raises errors.ModelFailed with the plain reason."""
        entry = self.find(name)
        if entry.task is None:
            entry.task = asyncio.get_running_loop().create_task(self._keep(entry))
        while entry.state is not State.READY or entry.worker is None:
            if entry.state is State.FAILED:
                raise errors.ModelFailed(entry.why)
            await entry.changed.wait()
        return entry.worker.ready

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator["Lease"]:
        """A model in use: it stays loaded as long as this lasts."""
        entry = self.find(name)
        entry.uses += 1
        try:
            await self.load(name)
            yield Lease(self, entry)
        finally:
            entry.uses -= 1

    async def stop(self) -> None:
        """Ends all workers."""
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- inside ----------------------------------------------------------------------------------

    def _set(self, entry: Entry, state: State, why: str = "") -> None:
        entry.state, entry.why = state, why
        entry.changed.set()
        entry.changed = asyncio.Event()

    async def _keep(self, entry: Entry) -> None:
        """Starts a worker and starts it again when it dies, until it fails for good."""
        loop, name = asyncio.get_running_loop(), entry.load.name
        try:
            while True:
                self._set(entry, State.LOADING)
                try:
                    entry.worker = await Worker.start(entry.load, timeout=entry.timeout)
                except LoadError as error:
                    entry.retry_at = loop.time() + COOL_S
                    self._set(entry, State.FAILED, str(error))
                    return
                self._set(entry, State.READY)
                why = await asyncio.shield(entry.worker.ended)
                entry.worker = None
                entry.deaths.append(loop.time())
                state, delay = verdict(entry.deaths, loop.time())
                log.error("the model %s: its process %s", name, why)
                entry.retry_at = loop.time() + delay
                self._set(entry, state, f"its process {why}")
                if state is State.FAILED:
                    return
                await asyncio.sleep(delay)
        finally:
            entry.task = None
            if entry.worker is not None:
                worker, entry.worker = entry.worker, None
                await worker.stop()


class Lease:
    """The right to use one loaded model for a while."""

    def __init__(self, pool: Pool, entry: Entry) -> None:
        self._pool = pool
        self._entry = entry

    @property
    def ready(self) -> wire.Ready:
        """What the model is. Raises errors.Unavailable if its worker is just gone."""
        if self._entry.worker is None:
            raise errors.Unavailable(
                "the model's process has just ended; try again", headers={"retry-after": "1"}
            )
        return self._entry.worker.ready

    async def call(self, make: Make) -> AsyncGenerator[wire.Event, None]:
        """One answer's events, by the law of the wire; closing the iterator cancels it.

        A request that its worker had not accepted when it died is sent once more, to the next one.
        """
        for attempt in (1, 2):
            worker = await self._pool.load(self._entry.load.name)
            call: Call = worker.call(make)
            try:
                async for event in call:
                    if isinstance(event, wire.Failed) and event.kind == "WorkerDied" and not call.accepted:
                        if attempt == 1:
                            break
                        event = _busy_dying(event)
                    yield event
                else:
                    return
            finally:
                call.cancel()

    async def calls(self, makes: Sequence[Make]) -> AsyncGenerator[tuple[int, wire.Event], None]:
        """Many answers' events, one answer after the other, though all run at once; closing cancels all.

        They are sent once more if their worker died before it had accepted any of them.
        """
        for attempt in (1, 2):
            worker = await self._pool.load(self._entry.load.name)
            calls, again = worker.calls(makes), False
            try:
                for index, call in enumerate(calls):
                    async for event in call:
                        if (
                            isinstance(event, wire.Failed)
                            and event.kind == "WorkerDied"
                            and not any(call.accepted for call in calls)
                        ):
                            again = attempt == 1
                            if again:
                                break
                            event = _busy_dying(event)
                        yield index, event
                    if again:
                        break
                else:
                    return
            finally:
                worker.cancel(calls)


def _busy_dying(event: wire.Failed) -> wire.Failed:
    """A request that found no living worker twice may well be answered later."""
    return wire.Failed(id=event.id, kind="Unavailable", message=event.message, retry_after=1.0)
