"""One model's life: it is loaded on use, restarted when its process dies, and unloaded when it is idle.

    unloaded ──lease──▶ loading ──Ready──▶ ready ──death──▶ waiting ──back-off──▶ loading
       ▲                  │ └──refused, or three deaths before Ready──▶ failed ──lease after COOL_S──▶ loading
       ├──does not fit────┘
       └──idle for its keep-alive, evicted or told to unload── ready

`Restarts` and the functions decide and have no clock; `ManagedModel` acts.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from pathlib import PurePath
from typing import Protocol

from msgspec import structs

from tinyoai import errors, wire
from tinyoai.engine import facts
from tinyoai.engine.facts import MemoryEstimate
from tinyoai.models.model_status import ModelStatus, State
from tinyoai.models.registry import LastLoad, Model
from tinyoai.models.spawn import SpawnedWorker
from tinyoai.models.worker import LoadDied, LoadError, Worker

log = logging.getLogger("tinyoai.pool")

LOAD_ATTEMPTS = 3
"""Deaths in a row before Ready that make a model failed."""
COOL_S = 60.0
"""Seconds until a request may try a failed model again."""
FIRST_DELAY_S, LAST_DELAY_S = 0.1, 10.0
"""Back-off before a second restart in a row; it doubles with each further one."""
RECENT = 16
"""Answers over which tokens per second are averaged."""
MIB = 1 << 20
FOREVER = -1.0
"""A keep-alive that never ends."""


class Restarts:
    """Decides what follows the death of a model's process."""

    __slots__ = ("_n_in_a_row", "_n_unready")

    def __init__(self) -> None:
        self._n_in_a_row = 0
        self._n_unready = 0

    def on_done(self) -> None:
        """A request was answered, so the process works."""
        self._n_in_a_row = 0

    def on_death(self, *, ready: bool) -> tuple[State, float]:
        """Returns the next state and the seconds to stay in it. `ready`: the model had been loaded."""
        self._n_in_a_row += 1
        self._n_unready = 0 if ready else self._n_unready + 1
        if self._n_unready >= LOAD_ATTEMPTS:
            return State.FAILED, COOL_S
        if self._n_in_a_row == 1:
            return State.WAITING, 0.0
        # the exponent is bounded: a float ends at 2 ** 1024
        return State.WAITING, min(LAST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._n_in_a_row - 2, 60))


def estimate(model: Model, load: wire.Load) -> MemoryEstimate:
    """Memory that a load takes: by the formula of its engine, or what the last such load took if that was more."""
    engine = facts.ENGINES.get(load.engine)
    if engine is None:  # the worker refuses the load in words
        return MemoryEstimate(facts.WORKER_BYTES + model.size, 0, load.n_ctx)
    found = engine.estimate(model.hparams, model.size, load)
    last = model.loaded
    if last is not None and last.settings == _settings(load):
        found = found.at_least(last.resident_bytes)
    return found.more(load.cache_ram)


def _settings(load: wire.Load) -> str:
    """What decides the memory of a load, beside its file."""
    return (
        f"{load.engine} {load.n_ctx}x{load.n_slots} cells {load.n_cells} {load.kv} "
        f"batch {load.n_batch} cache {load.cache_type_k}/{load.cache_type_v} "
        f"flash {load.flash_attn} mmap {load.mmap} gpu {load.n_gpu_layers}"
        + (f" lora {sum(adapter.size for adapter in load.adapters)}" if load.adapters else "")
    )


def last_load(load: wire.Load, ready: wire.Ready) -> LastLoad:
    """What a load has shown, for the registry."""
    resident = (ready.resident_bytes + MIB - 1) // MIB * MIB
    return LastLoad(
        settings=_settings(load),
        resident_bytes=resident,  # in whole MiB, so that equal loads leave the registry as it is
        n_embd_out=ready.info.n_embd_out,
        pooling=ready.info.pooling,
    )


class Owner(Protocol):
    """A pool, as its models see it."""

    keep_alive_s: float
    load_timeout_s: float

    async def refresh(self, name: str) -> Model:
        """The model's row, after a look at its file. Raises errors.ModelNotFound."""

    def make_load(self, model: Model) -> wire.Load:
        """The Load of a model."""

    def share_cores(self) -> None:
        """A worker has become busy or idle."""

    async def make_room(self, model: "ManagedModel") -> None:
        """Reserves the model's memory, which may unload others. Raises errors.Unavailable or a subclass."""

    def take_spawned(self) -> SpawnedWorker | None:
        """A process that was started ahead, for one caller; else None."""

    def notify_freed(self) -> None:
        """A model may have become idle or is unloaded."""

    def notify_loaded(self, model: Model, loaded: LastLoad) -> None:
        """A model is loaded; it has shown this."""

    def notify_done(self, name: str, done: wire.Done, choices: list[wire.ChoiceDone]) -> None:
        """A request was answered."""


class ManagedModel:
    """One model with its worker process. Times are seconds of the loop's clock."""

    def __init__(self, model: Model, owner: Owner) -> None:
        self._owner = owner
        self.model = model
        self.defaults = model.all_defaults
        """Values of request fields that a request leaves out."""
        self.load = owner.make_load(model)
        self.estimate = estimate(model, self.load)
        # state
        self.state = State.UNLOADED
        self.reason = ""
        self.worker: Worker | None = None
        self.reserved = False
        """Its memory counts against the budget: it is loaded, or will be."""
        self.n_deaths = 0
        self.changed = asyncio.Event()
        """Set, and replaced by a new one, at every change of state."""
        self._restarts = Restarts()
        self._retry_at = 0.0
        self._refusal: errors.ApiError | None = None
        """The reason why the last load ended before a process was started."""
        self._task: asyncio.Task[None] | None = None
        self._loaded_at = 0.0
        self._stopping: Worker | None = None
        self._in_hurry = False
        # use
        self.n_leases = 0
        self.keep_alive_s = owner.keep_alive_s
        self.unload_pending = False
        self.last_used = 0.0
        """0: never."""
        self._timer: asyncio.TimerHandle | None = None
        self._generation = 0
        """The number of finished unloads that were pending. A lease taken while one is pending belongs to the next."""
        self._n_next = 0
        """Leases of the next generation: they wait for the unload."""
        self._n_answers = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        """Tokens and milliseconds."""

    @property
    def name(self) -> str:
        """The id that clients use."""
        return self.model.name

    @property
    def loaded(self) -> bool:
        """It is loaded or being loaded."""
        return self.reserved or self._task is not None

    def status(self) -> ModelStatus:
        """A snapshot for clients and metrics."""
        now, worker = asyncio.get_running_loop().time(), self.worker
        if self.state is not State.READY:
            worker = None
        n_running = worker.n_running if worker is not None else 0
        spent_ms = sum(milliseconds for _, milliseconds in self._recent)
        n_tokens = sum(n for n, _ in self._recent)
        return ModelStatus(
            name=self.name,
            state=self.state,
            reason=self.reason,
            reserved=self.reserved,
            estimated_bytes=self.estimate.total,
            keep_alive_s=self.keep_alive_s,
            unload_pending=self.unload_pending,
            unloads_in_s=None if self._timer is None else max(0.0, self._timer.when() - now),
            n_leases=self.n_leases,
            n_answers=self._n_answers,
            n_deaths=self.n_deaths,
            tokens_per_second=n_tokens / spent_ms * 1000.0 if spent_ms > 0 else None,
            last_used=int(time.time() - (now - self.last_used)) if self.last_used else None,
            pid=worker.pid if worker is not None else None,
            ready=worker.ready if worker is not None else None,
            uptime_s=now - self._loaded_at if worker is not None else 0.0,
            n_running=n_running,
            n_queued=worker.n_open - n_running if worker is not None else 0,
            n_threads=worker.n_threads if worker is not None else 0,
        )

    # -- leases ----------------------------------------------------------------------------------

    def add_lease(self, keep_alive_s: float | None) -> int:
        """Counts a lease, and returns its generation for `acquire` and `drop_lease`."""
        self.n_leases += 1
        self._stop_timer()
        if keep_alive_s is not None:
            self.keep_alive_s = keep_alive_s
        self._n_next += self.unload_pending
        return self._generation + self.unload_pending

    def drop_lease(self, generation: int) -> None:
        """Ends a lease. The last one starts the keep-alive, or unloads the model."""
        loop = asyncio.get_running_loop()
        self.n_leases -= 1
        self.last_used = loop.time()
        if generation > self._generation:
            self._n_next -= 1
        if self.unload_pending and self.n_leases == self._n_next:
            self._begin_unload()
        if self.n_leases:
            return
        self._owner.notify_freed()
        if self.keep_alive_s == 0:
            self._begin_unload()
        elif self.keep_alive_s > 0 and self._task is not None:
            self._timer = loop.call_later(self.keep_alive_s, self._begin_unload)

    def is_ready(self, generation: int) -> bool:
        """A lease of this generation can send requests now."""
        worker = self.worker
        return (
            self.state is State.READY
            and worker is not None
            and worker.alive
            and generation <= self._generation
        )

    async def acquire(self, generation: int, limit: float | None) -> Worker:
        """The worker for a lease, loaded if need be. Waits until the time `limit`; None: as long as it takes.

        Raises errors.ModelLoading at the limit, ModelFailed, InsufficientMemory or ModelNotFound.
        """
        loop = asyncio.get_running_loop()
        while not self.is_ready(generation):
            if generation <= self._generation:
                if self.state is State.FAILED and loop.time() < self._retry_at:
                    raise errors.ModelFailed(f"the model {self.name!r} failed: {self.reason}")
                if self._task is None:
                    self._refusal = None
                    self._set(State.LOADING)
                    self._task = loop.create_task(self._supervise())
                    self._task.add_done_callback(self._on_unloaded)
            changed = self.changed
            try:
                # not wait_for, which loses a cancel that comes together with the event
                async with asyncio.timeout_at(limit):
                    await changed.wait()
            except TimeoutError:
                raise errors.ModelLoading(
                    f"the model {self.name!r} is still loading; try again soon"
                ) from None
            if self._refusal is not None:
                raise _copy(self._refusal)
        assert self.worker is not None
        return self.worker

    def note_done(self, done: wire.Done, choices: Sequence[wire.ChoiceDone]) -> None:
        """Counts an answered request."""
        self._restarts.on_done()
        self._n_answers += 1
        self._recent.extend((c.n_generated, c.predicted_ms) for c in choices if c.n_generated)
        self._owner.notify_done(self.name, done, list(choices))

    def shed_cache(self) -> bool:
        """Gives up the memory for finished conversations, so that the model itself fits. False: it has none."""
        if not self.load.cache_ram:
            return False
        self.load = structs.replace(self.load, cache_ram=0)
        self.estimate = estimate(self.model, self.load)
        log.warning(
            "%s: memory is short, so finished conversations stay in slots and on disk only", self.name
        )
        return True

    # -- unloading -------------------------------------------------------------------------------

    async def unload(self) -> bool:
        """Unloads the model now, or when its running answers are finished. Returns whether it was loaded.

        In the second case it returns at once, and new leases wait until the model is loaded again.
        """
        if not self.loaded:
            return False
        if self.n_leases > self._n_next:
            self.unload_pending = True
        else:
            await self.end()
        return True

    async def evict(self) -> None:
        """Unloads the model unless it is leased, and returns when its memory is free."""
        if not self.n_leases:
            await self.end()

    async def end(self) -> None:
        """Unloads the model even if it is leased, and returns when its memory is free."""
        task = self._task
        if task is not None:
            self._begin_unload()
            await asyncio.wait({task})

    def hurry(self) -> None:
        """Ends the process now if it is being stopped, or as soon as it is."""
        self._in_hurry = True
        if self._stopping is not None:
            self._stopping.hurry()

    def _begin_unload(self) -> None:
        self._stop_timer()
        # once: a second cancel would reach the task while it stops the worker
        if self._task is not None and self.state is not State.UNLOADED:
            self._set(State.UNLOADED)
            self.keep_alive_s = (
                self._owner.keep_alive_s
            )  # a request's keep-alive goes with the load it was for
            self._task.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- the process -----------------------------------------------------------------------------

    def _set(self, state: State, reason: str = "") -> None:
        self.state = state
        # clients learn no folder of this machine
        for adapter in self.load.adapters:
            reason = reason.replace(adapter.path, PurePath(adapter.path).name)
        self.reason = reason.replace(self.model.path, "its file") if self.model.path else reason
        self.changed.set()
        self.changed = asyncio.Event()

    def note_waiting(self, reason: str) -> None:
        """The load waits for memory."""
        self._set(State.LOADING, reason)

    async def _supervise(self) -> None:
        """Loads the model and restarts its process until it fails or is unloaded."""
        loop = asyncio.get_running_loop()
        self._restarts = Restarts()
        try:
            try:
                self.model = await self._owner.refresh(self.name)
                self.defaults = self.model.all_defaults
                self.load = self._owner.make_load(self.model)
                self.estimate = estimate(self.model, self.load)
                await self._owner.make_room(self)
            except errors.ApiError as error:
                self._refusal = error
                return
            while True:
                state, delay, reason = await self._run_once()
                self._retry_at = loop.time() + delay
                if state is State.FAILED:
                    self.state, self.reason = state, reason  # announced by _on_unloaded
                    return
                self._set(state, reason)
                if delay:
                    await asyncio.sleep(delay)
        except Exception:
            log.exception("the model %s could not be loaded", self.name)
            self._refusal = errors.InternalError("the model could not be loaded; see the server's log")
        finally:
            self._stopping, self.worker = self.worker, None
            if self._stopping is not None:
                if self._in_hurry:
                    self._stopping.hurry()
                await self._stopping.stop()
                self._stopping = None

    def _on_unloaded(self, task: asyncio.Task[None]) -> None:
        # a done callback, since a task that is cancelled before its first step runs no finally
        self._task = None
        self.reserved = False
        if self.unload_pending:
            self.unload_pending, self._n_next = False, 0
            self._generation += 1
        if self.state is State.FAILED:
            self._set(State.FAILED, self.reason)
        else:
            self._set(State.UNLOADED)
        self._owner.notify_freed()

    async def _run_once(self) -> tuple[State, float, str]:
        """Runs one process until it ends. Returns the next state, the seconds in it, and the reason."""
        self._set(State.LOADING)
        ready = False
        try:
            spawned = self._owner.take_spawned()
            self.worker = await Worker.start(
                self.load,
                timeout=self._owner.load_timeout_s,
                spawned=spawned,
                on_busy=self._owner.share_cores,
            )
            ready = True
            self._loaded_at = asyncio.get_running_loop().time()
            self._set(State.READY)
            if self.load.reproducible and not self.worker.ready.reproducible:
                log.warning(
                    "%s: equal requests may get different answers here: the self-test failed", self.name
                )
            self._owner.notify_loaded(self.model, last_load(self.load, self.worker.ready))
            why = await asyncio.shield(self.worker.ended)
            self.worker = None
        except LoadDied as error:
            why = str(error)
        except (LoadError, OSError) as error:
            return State.FAILED, COOL_S, str(error)
        self.n_deaths += 1
        log.error("%s: its process %s", self.name, why)
        return *self._restarts.on_death(ready=ready), f"its process {why}"


def _copy(error: errors.ApiError) -> errors.ApiError:
    """The same error for another request: an exception that is raised twice keeps growing its traceback."""
    return type(error)(error.message, param=error.param, code=error.code, headers=error.headers)
