"""Which models run, that they keep running, and that they fit into memory together.

Owns one entry for every model that was asked for: its worker, its state, its uses, its deaths. `verdict` and
`plan` decide and have no clock, no process and no await; `Pool` carries out. What models there are it asks the
catalog. It knows neither HTTP nor a request's contents.

    unloaded ──use──▶ loading ──Ready──▶ ready ──death──▶ waiting ──back-off──▶ loading
       ▲                 │ └──refused──▶ failed ◀──third death in a minute──┘      (a failed one is tried anew
       └──does not fit───┘                  └───────────after COOL_S, on request──────────▶ loading)
       └──idle for its keep-alive, or its memory is wanted── ready
"""

import asyncio
import enum
import logging
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

from tinyoai import errors, wire
from tinyoai.host import memory
from tinyoai.models.catalog import Catalog
from tinyoai.models.eviction import Loaded, plan
from tinyoai.models.memory_estimate import need
from tinyoai.models.registry import Defaults, Model
from tinyoai.models.worker import LoadDied, LoadError, Make, Take, Worker
from tinyoai.text import template

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
SHARE = 0.9
"""How much of what can be had is used where no budget is set: the rest is for everything else."""
RECENT = 16
"""Answers over which the speed in tokens a second is reckoned."""
FOREVER = -1.0
"""A keep-alive that never ends."""


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
    """One model that was asked for. Times are of the loop's clock, in seconds."""

    __slots__ = (
        "changed",
        "deaths",
        "holds",
        "keep_s",
        "last_use",
        "leaving",
        "load",
        "loaded_at",
        "model",
        "n_answers",
        "n_deaths",
        "need",
        "recent",
        "refusal",
        "retry_at",
        "state",
        "task",
        "timer",
        "uses",
        "why",
        "worker",
    )

    def __init__(self, model: Model, load: wire.Load, keep_s: float) -> None:
        # what it is
        self.model = model
        self.load = load
        self.need = need(model, load)
        # how it is
        self.state = State.UNLOADED
        self.why = ""
        self.worker: Worker | None = None
        self.holds = False
        """Its memory counts: it is loaded, or will be."""
        self.deaths: deque[float] = deque(maxlen=DEATHS)
        """When its process last ended by itself."""
        self.n_deaths = 0
        """All of them, since the server started."""
        self.retry_at = 0.0
        self.refusal: errors.ApiError | None = None
        """Why the last attempt to load it never came to a process."""
        self.changed = asyncio.Event()
        """Set, and replaced by a new one, at every change of state."""
        self.task: asyncio.Task[None] | None = None
        # how it is used
        self.uses = 0
        self.keep_s = keep_s
        """Seconds that it stays loaded without a use; below 0: for ever."""
        self.leaving = False
        """It was told to go, and does with its last use."""
        self.timer: asyncio.TimerHandle | None = None
        self.loaded_at = 0.0
        self.last_use = 0.0
        """0: never."""
        self.n_answers = 0
        self.recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        """Tokens and milliseconds of the last answers."""

    @property
    def created(self) -> int:
        """When the model's file was made, in Unix seconds."""
        return self.model.created

    @property
    def tokens_per_second(self) -> float | None:
        """The decode speed of one stream over the last answers; None before the first."""
        milliseconds = sum(spent for _, spent in self.recent)
        return sum(n for n, _ in self.recent) / milliseconds * 1000.0 if milliseconds > 0 else None

    def note(self, event: wire.Event, on_done: Callable[[str, wire.Done], None] | None) -> None:
        """Every event passes here; only the end of a good answer counts."""
        if isinstance(event, wire.Done):
            self.n_answers += 1
            if event.n_generated:
                self.recent.append((event.n_generated, event.predicted_ms))
            if on_done is not None:
                on_done(self.model.name, event)


class Pool:
    """All models of this server. `budget` is in bytes, 0: from the memory there is; times are in seconds."""

    def __init__(
        self,
        catalog: Catalog,
        make_load: Callable[[Model], wire.Load],
        *,
        budget: int = 0,
        keep_alive: float = FOREVER,
        timeout: float = 300.0,
    ) -> None:
        # as set
        self.catalog = catalog
        self._make_load = make_load
        self._budget = budget
        self._keep_alive = keep_alive
        self._timeout = timeout
        self.on_done: Callable[[str, wire.Done], None] | None = None
        """Told of every answer that is complete, with its model's name; it must not raise."""
        # what runs
        self._entries: dict[str, Entry] = {}
        self._freed = asyncio.Event()
        """Set, and replaced by a new one, whenever a model may have become idle or is gone."""
        self._chores: set[asyncio.Task[None]] = set()
        self._looking = asyncio.Lock()
        self.find(catalog.default)

    @property
    def entries(self) -> list[Entry]:
        """All models that were asked for, the default one first."""
        return list(self._entries.values())

    @property
    def default(self) -> Entry:
        """The model that was given at start."""
        return self._entries[self.catalog.default]

    def budget(self) -> int:
        """Bytes that all loaded models together may take."""
        if self._budget:
            return self._budget
        room = memory.available()
        if room is None:
            return sys.maxsize
        own = sum(memory.held(entry.worker.pid) for entry in self.entries if entry.worker is not None)
        return int(SHARE * (room + own))

    def planned_context(self, model: Model) -> int:
        """The context window in tokens that a model is loaded with."""
        return self._make_load(model).n_ctx

    # -- finding ---------------------------------------------------------------------------------

    def find(self, name: str) -> Entry:
        """The entry of a name or alias, as far as is known. Raises errors.ModelNotFound."""
        view = self.catalog.view
        entry = self._entries.get(view.aliases.get(name, name))
        if entry is not None and entry.holds:
            return entry  # whatever has become of its file, it is loaded
        model = self.catalog.lookup(name)
        entry = self._entries.get(model.name)
        if entry is None:
            entry = self._entries[model.name] = Entry(model, self._make_load(model), self._keep_alive)
        return entry

    async def entry(self, name: str) -> Entry:
        """As find, but looks for new files before it gives up. Raises errors.ModelNotFound."""
        try:
            return self.find(name)
        except errors.ModelNotFound:
            await self.look()
            return self.find(name)

    async def look(self) -> None:
        """Looks for new and vanished files; of many who ask at once, one looks."""
        begun = self.catalog.begun
        async with self._looking:
            if self.catalog.ended <= begun:
                await asyncio.to_thread(self.catalog.refresh)

    async def open(self, home: str) -> None:
        """Opens the registry in the data directory, and looks for models."""
        async with self._looking:
            try:
                await asyncio.to_thread(self.catalog.open, home)
            except Exception:
                log.exception("looking for models failed; the given one is served")

    # -- loading ---------------------------------------------------------------------------------

    async def load(self, entry: Entry, wait_s: float | None = WAIT_S) -> Worker:
        """The model's worker, started if need be. Raises errors.Unavailable and its kinds, or ModelNotFound.

        The entry must be in use. `wait_s` None: as long as it takes.
        """
        loop, name = asyncio.get_running_loop(), entry.model.name
        deadline = None if wait_s is None else loop.time() + wait_s
        while entry.state is not State.READY or entry.worker is None or not entry.worker.alive:
            if entry.state is State.FAILED and loop.time() < entry.retry_at:
                raise errors.ModelFailed(f"the model {name!r} cannot be kept up: {entry.why}")
            if entry.task is None:
                entry.refusal = None
                self._set(entry, State.LOADING)
                entry.task = loop.create_task(self._keep(entry))
            changed = entry.changed
            try:
                # not wait_for, which loses a cancel that comes together with the event
                async with asyncio.timeout_at(deadline):
                    await changed.wait()
            except TimeoutError:
                raise errors.ModelLoading(f"the model {name!r} is still loading; try again soon") from None
            if entry.refusal is not None:
                raise _again(entry.refusal)
        return entry.worker

    async def first_load(self) -> wire.Ready:
        """Loads the default model and waits as long as that takes. Raises errors.ApiError with the plain reason."""
        entry = self.default
        self._take(entry)
        try:
            return (await self.load(entry, None)).ready
        except errors.ModelFailed:
            raise errors.ModelFailed(entry.why) from None
        finally:
            self._release(entry)

    @asynccontextmanager
    async def lease(self, name: str, keep_alive: float | None = None) -> AsyncIterator["Lease"]:
        """A model in use: it stays loaded as long as this lasts, and `keep_alive` seconds longer."""
        entry = await self.entry(name)
        self._take(entry, keep_alive)
        try:
            await self.load(entry)
            yield Lease(self, entry)
        finally:
            self._release(entry)

    async def warm(self, name: str, keep_alive: float | None = None) -> tuple[Entry, bool]:
        """Loads a model, however long that takes; the entry, and whether it was loaded already."""
        entry = await self.entry(name)
        already = entry.state is State.READY
        self._take(entry, keep_alive)
        try:
            await self.load(entry, None)
        finally:
            self._release(entry)
        return entry, already

    async def unload(self, name: str) -> tuple[Entry, bool]:
        """Unloads a model, or has it unloaded after its running answers; the entry, and whether it was loaded."""
        entry = await self.entry(name)
        loaded = entry.holds or entry.task is not None
        if loaded and entry.uses:
            entry.leaving = True
        else:
            await self._unload(entry)
        return entry, loaded

    async def forget(self, name: str) -> None:
        """Takes a model off the registry, and unloads it. Raises errors.BadRequest, or RegistryError."""
        await asyncio.to_thread(self.catalog.forget, name)
        entry = self._entries.get(name)
        if entry is not None and entry.uses:
            entry.leaving = True
        elif entry is not None:
            await self._unload(entry)
            # another may have taken it away meanwhile, or use it again
            if self._entries.get(name) is entry and not entry.uses and entry.task is None:
                del self._entries[name]

    async def stop(self) -> None:
        """Ends all workers."""
        for entry in self.entries:
            if entry.timer is not None:
                entry.timer.cancel()
        for task in self._chores:
            task.cancel()
        ending = [self._end(entry, entry.task) for entry in self.entries if entry.task is not None]
        await asyncio.gather(*self._chores, *ending, return_exceptions=True)

    # -- uses ------------------------------------------------------------------------------------

    def _take(self, entry: Entry, keep_alive: float | None = None) -> None:
        entry.uses += 1
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None
        if keep_alive is not None:
            entry.keep_s = keep_alive

    def _release(self, entry: Entry) -> None:
        loop = asyncio.get_running_loop()
        entry.uses -= 1
        entry.last_use = loop.time()
        if entry.uses:
            return
        self._tell()
        if entry.leaving or entry.keep_s == 0:
            self._expire(entry)
        elif entry.keep_s > 0:
            entry.timer = loop.call_later(entry.keep_s, self._expire, entry)

    def _expire(self, entry: Entry) -> None:
        task = asyncio.get_running_loop().create_task(self._unload(entry))
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    def _tell(self) -> None:
        self._freed.set()
        self._freed = asyncio.Event()

    # -- inside ----------------------------------------------------------------------------------

    def _set(self, entry: Entry, state: State, why: str = "") -> None:
        entry.state = state
        entry.why = why.replace(entry.model.path, "its file") if entry.model.path else why
        entry.changed.set()
        entry.changed = asyncio.Event()

    async def _unload(self, entry: Entry) -> None:
        """Ends the model's worker, unless a use has begun meanwhile; returns when its memory is free."""
        if entry.task is not None and not entry.uses:
            await asyncio.wait({self._end(entry, entry.task)})

    def _end(self, entry: Entry, task: asyncio.Task[None]) -> asyncio.Task[None]:
        """Cancels a task of _keep, once: a second cancel would reach it while it stops its worker."""
        if entry.state is not State.UNLOADED:
            self._set(entry, State.UNLOADED)
            entry.keep_s = self._keep_alive  # what a request had asked for goes with what it was asked of
            if entry.timer is not None:
                entry.timer.cancel()
                entry.timer = None
            task.cancel()
        return task

    async def _make_room(self, entry: Entry) -> None:
        """Unloads what must go so that this one fits, and counts it. Raises errors.Unavailable and its kinds."""
        while True:
            budget = self.budget()
            others = [
                Loaded(other.model.name, other.need.total, other.uses, other.last_use)
                for other in self.entries
                if other.holds
            ]
            decision = plan(others, entry.need.total, budget)
            if decision.refuse:
                raise _too_large(entry, budget)
            if not decision.wait and not decision.unload:
                entry.holds = True
                return
            if decision.wait:
                freed = self._freed
                self._set(entry, State.LOADING, "waits until another model is idle")
                await freed.wait()
                if not entry.uses:
                    raise errors.ModelLoading("nobody waits for it any more")
            for name in decision.unload:
                log.info("unloading %s to make room for %s", name, entry.model.name)
                chosen = self._entries.get(name)  # it may have been forgotten while another was unloaded
                if chosen is not None:
                    await self._unload(chosen)

    async def _keep(self, entry: Entry) -> None:
        """Starts a worker and starts it again when it dies, until it fails for good."""
        loop, name = asyncio.get_running_loop(), entry.model.name
        try:
            try:
                entry.model = await asyncio.to_thread(self.catalog.current, name)
                entry.load = self._make_load(entry.model)
                entry.need = need(entry.model, entry.load)
                await self._make_room(entry)
            except errors.ApiError as error:
                entry.refusal = error
                return
            while True:
                self._set(entry, State.LOADING)
                try:
                    entry.worker = await Worker.start(entry.load, timeout=self._timeout)
                    entry.loaded_at = loop.time()
                    self._set(entry, State.READY)
                    why = await asyncio.shield(entry.worker.ended)
                    entry.worker = None
                except LoadDied as error:
                    why = str(error)
                except (LoadError, OSError) as error:
                    entry.retry_at = loop.time() + COOL_S
                    self._set(entry, State.FAILED, str(error))
                    return
                entry.deaths.append(loop.time())
                entry.n_deaths += 1
                state, delay = verdict(entry.deaths, loop.time())
                log.error("the model %s: its process %s", name, why)
                entry.retry_at = loop.time() + delay
                self._set(entry, state, f"its process {why}")
                if state is State.FAILED:
                    return
                await asyncio.sleep(delay)
        except Exception:
            log.exception("the model %s could not be loaded", name)
            entry.refusal = errors.InternalError("the model could not be loaded; the server's log says why")
        finally:
            worker, entry.worker = entry.worker, None
            try:
                if worker is not None:
                    await worker.stop()
            finally:
                # nothing below waits: the books are right whenever another task runs
                entry.holds = entry.leaving = False
                entry.task = None
                if entry.state is not State.FAILED:
                    entry.state, entry.why = State.UNLOADED, ""
                self._set(entry, entry.state, entry.why)
                self._tell()


def _again(error: errors.ApiError) -> errors.ApiError:
    """The same for one more request: an exception that is raised twice keeps growing its traceback."""
    return type(error)(error.message, param=error.param, code=error.code, headers=error.headers)


def _too_large(entry: Entry, budget: int) -> errors.InsufficientMemory:
    need, load = entry.need, entry.load
    fits = need.largest_context(budget)
    advice = (
        f"a context of {fits} tokens would fit (--ctx-size {fits}), or fewer requests at a time with --parallel"
        if fits
        else "take a smaller or more quantized model"
    )
    window = f" with {need.n_ctx} tokens of context for each of {load.n_slots} requests" if need.n_ctx else ""
    return errors.InsufficientMemory(
        f"the model {entry.model.name!r} needs about {need.total / 1e6:.0f} MB{window}, and "
        f"{budget / 1e6:.0f} MB can be had; {advice}"
    )


class Lease:
    """The right to use one loaded model for a while."""

    def __init__(self, pool: Pool, entry: Entry) -> None:
        self._pool = pool
        self._entry = entry

    @property
    def model(self) -> str:
        """The id that is served, whatever alias was asked for."""
        return self._entry.model.name

    @property
    def defaults(self) -> Defaults:
        """What the model's requests mean where they leave a field out."""
        return self._entry.model.defaults

    def render(self, given: str, messages: Sequence[template.Message]) -> template.Rendered:
        """A conversation's prompt in the chat format `given`.

        Of "auto" that is the model's own, else what its file speaks of.
        """
        ready = self.ready
        name = self._entry.model.template if given == "auto" else given
        if name == "auto":
            name = template.detect(ready.chat_template, ready.special)
        return template.render(name, messages, special=ready.special)

    @property
    def ready(self) -> wire.Ready:
        """What the model is. Raises errors.Unavailable if its worker is just gone."""
        if self._entry.worker is None:
            raise errors.Unavailable(
                "the model's process has just ended; try again", headers={"retry-after": "1"}
            )
        return self._entry.worker.ready

    async def call(self, make: Make, take: Take | None = None) -> AsyncGenerator[wire.Event, None]:
        """One answer's events, by the law of the wire; closing the iterator cancels it.

        What `take` takes comes in no other way. A request that its worker had not accepted when it died is
        sent once more, to the next one.
        """
        async with aclosing(self.calls([make], take)) as source:
            async for _, event in source:
                yield event

    async def calls(
        self, makes: Sequence[Make], take: Take | None = None
    ) -> AsyncGenerator[tuple[int, wire.Event], None]:
        """Many answers' events, one answer after the other, though all run at once; closing cancels all.

        They are sent once more if their worker died before it had accepted any of them.
        """
        for attempt in (1, 2):
            worker = await self._pool.load(self._entry)
            calls, again = worker.calls(makes), False
            for call in calls:
                call.take = take
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
                        self._entry.note(event, self._pool.on_done)
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
