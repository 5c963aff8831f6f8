"""All models of a server: names, the memory budget, eviction, and leases.

`eviction.plan` decides which models to unload; Pool carries it out. Each model's life is ManagedModel's.
"""

import asyncio
import itertools
import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from tinyoai import errors, wire
from tinyoai.host import cores, memory
from tinyoai.models import core_grants
from tinyoai.models.catalog import Catalog
from tinyoai.models.eviction import Loaded, plan
from tinyoai.models.managed_model import FOREVER, ManagedModel
from tinyoai.models.model_status import State
from tinyoai.models.pending_calls import EventQueue, EventSink, PendingCall
from tinyoai.models.registry import Defaults, LastLoad, Model
from tinyoai.models.spawn import SpawnedWorker
from tinyoai.models.worker import Worker

__all__ = ["FOREVER", "Lease", "ManagedModel", "Pool", "State"]

log = logging.getLogger("tinyoai.pool")

WAIT_S = 30.0
"""Seconds that a request waits for a worker, in total."""
SHARE = 0.9
"""Share of the available memory that is the budget where none is set. The rest is for everything else."""

_groups = itertools.count(1)


class Lease:
    """A counted use of a model. While it is open the model is not evicted."""

    def __init__(self, model: ManagedModel, keep_alive_s: float | None = None) -> None:
        self._model = model
        self._generation = model.add_lease(keep_alive_s)

    def close(self) -> None:
        """Ends the use. Call it once."""
        self._model.drop_lease(self._generation)

    @property
    def name(self) -> str:
        """The served id, also if the client used an alias."""
        return self._model.name

    @property
    def defaults(self) -> Defaults:
        """Values of the fields that a request leaves out."""
        return self._model.defaults

    @property
    def loading(self) -> bool:
        """The model cannot answer yet."""
        return not self._model.is_ready(self._generation)

    async def ready(self, deadline: float | None = None, patient: bool = False) -> wire.Ready:
        """Waits for the load and returns its Ready.

        Waits 30 s at most, and not beyond `deadline`, a time of the loop's clock; `patient`: as long as the load
        takes. Raises errors.ModelLoading, ModelFailed, InsufficientMemory or ModelNotFound.
        """
        limit = asyncio.get_running_loop().time() + WAIT_S
        if deadline is not None:
            limit = min(limit, deadline)
        return (await self._model.acquire(self._generation, None if patient else limit)).ready

    async def run(
        self,
        bodies: Sequence[wire.Body],
        *,
        client: str = "",
        scope: str = "",
        deadline: float | None = None,
        sink: EventSink | None = None,
    ) -> AsyncGenerator[tuple[int, wire.Event], None]:
        """Runs requests, and yields their events with the index of the body, in order of arrival.

        Together they take one place in the queue, and they reuse prompts of the same scope only. Each body ends in one
        Done or Failed; no error is raised. Closing the generator cancels what runs.
        `sink` gets events as they arrive, and those that it takes are not yielded, nor is Started. If it raises, that
        request fails with InternalError.
        """
        group = f"group {next(_groups)}" if len(bodies) > 1 else ""
        queue = EventQueue()
        unsent: dict[int, wire.Body] = dict(enumerate(bodies))
        calls: dict[int, PendingCall] = {}
        n_pending = 0
        worker: Worker | None = None
        patience_s = WAIT_S
        clock = asyncio.get_running_loop().time
        try:
            while unsent or n_pending:
                if not n_pending:
                    begin = clock()
                    try:
                        limit = begin + patience_s if deadline is None else deadline
                        worker = await self._model.acquire(self._generation, limit)
                    except errors.ApiError as error:
                        for index in unsent:
                            yield index, _failed(error)
                        return
                    patience_s -= clock() - begin
                    sent = worker.send(
                        unsent, queue, client=client, scope=scope, group=group, deadline=deadline, sink=sink
                    )
                    calls = {call.index: call for call in sent}
                    unsent, n_pending = {}, len(calls)
                index, event = await queue.get()
                if isinstance(event, wire.Done):
                    n_pending -= 1
                    self._model.note_done(event, calls[index].choices)
                elif isinstance(event, wire.Failed):
                    n_pending -= 1
                    if event.kind == "WorkerDied" and not calls[index].started:
                        unsent[index] = bodies[index]
                        continue
                yield index, event
        finally:
            if worker is not None:
                worker.cancel(calls.values())


def _failed(error: errors.ApiError) -> wire.Failed:
    retry_after = error.headers.get("retry-after")
    return wire.Failed(
        id=0,
        kind=type(error).__name__,
        message=error.message,
        code=error.code,
        param=error.param,
        retry_after=None if retry_after is None else float(retry_after),
    )


class Pool:
    """All models of this server."""

    def __init__(
        self,
        catalog: Catalog,
        make_load: Callable[[Model], wire.Load],
        *,
        budget: int = 0,
        keep_alive: float = FOREVER,
        timeout: float = 300.0,
        spawned: SpawnedWorker | None = None,
    ) -> None:
        """`budget` is in bytes, 0: from the available memory. `keep_alive` and `timeout` (of a load) are in seconds.

        `spawned` is a worker process for the first load; the pool ends it if it is not used.
        """
        self.catalog = catalog
        self.make_load = make_load
        self.keep_alive_s = keep_alive
        self.load_timeout_s = timeout
        self.on_done: Callable[[str, wire.Done, list[wire.ChoiceDone]], None] | None = None
        """Gets each answered request with its model's name. Must not raise."""
        self._budget = budget
        self._spawned = spawned
        self._models: dict[str, ManagedModel] = {}
        self._n_cores = cores.available()
        self._sharing: asyncio.TimerHandle | None = None
        """Until the workers that are idle now no longer count as busy."""
        self._freed = asyncio.Event()
        """Set, and replaced by a new one, when a model may have become idle or is unloaded."""
        self._rescanning = asyncio.Lock()
        self._noting: set[asyncio.Future[None]] = set()
        """Writes to the registry that are not finished."""
        self.find(catalog.default)

    @property
    def models(self) -> list[ManagedModel]:
        """All models that were asked for, the default one first."""
        return list(self._models.values())

    @property
    def default(self) -> ManagedModel:
        """The model that was given at start."""
        return self._models[self.catalog.default]

    def budget(self) -> int:
        """Bytes that all loaded models together may take."""
        if self._budget:
            return self._budget
        free = memory.available()
        if free is None:
            return sys.maxsize
        own = sum(memory.unshared(model.worker.pid) for model in self.models if model.worker is not None)
        return int(SHARE * (free + own))

    # -- names -----------------------------------------------------------------------------------

    def find(self, name: str) -> ManagedModel:
        """The model of a name or alias. Does not touch the disk. Raises errors.ModelNotFound."""
        known = self._models.get(self.catalog.view.aliases.get(name, name))
        if known is not None and known.reserved:
            return known  # it is loaded, so its file does not matter
        model = self.catalog.lookup(name)
        if model.name not in self._models:
            self._models[model.name] = ManagedModel(model, self)
        return self._models[model.name]

    async def lookup(self, name: str) -> ManagedModel:
        """As find, but looks for new files before it gives up. Raises errors.ModelNotFound."""
        try:
            return self.find(name)
        except errors.ModelNotFound:
            await self.rescan()
            return self.find(name)

    async def rescan(self) -> None:
        """Looks for new and vanished files. Concurrent callers share one scan."""
        begun = self.catalog.begun
        async with self._rescanning:
            if self.catalog.ended <= begun:
                await asyncio.to_thread(self.catalog.refresh)

    async def open(self, home: str) -> None:
        """Opens the registry in the data directory and looks for models. Does not raise."""
        async with self._rescanning:
            try:
                await asyncio.to_thread(self.catalog.open, home)
            except Exception:
                log.exception("looking for models failed; only the given model is served")

    # -- use -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, name: str, keep_alive: float | None = None) -> AsyncIterator[Lease]:
        """A lease of a model, which need not be loaded yet. `keep_alive` in seconds replaces the model's.

        Raises errors.ModelNotFound.
        """
        lease = Lease(await self.lookup(name), keep_alive)
        try:
            yield lease
        finally:
            lease.close()

    async def preload(self, name: str, keep_alive: float | None = None) -> tuple[ManagedModel, bool]:
        """Loads a model, however long that takes. Returns it, and whether it was loaded already.

        Raises errors.ApiError if it cannot be loaded.
        """
        model = await self.lookup(name)
        lease = Lease(model, keep_alive)
        try:
            already = not lease.loading
            await lease.ready(patient=True)
        finally:
            lease.close()
        return model, already

    async def first_load(self) -> wire.Ready:
        """Loads the default model, however long that takes. Raises errors.ApiError with the plain reason."""
        lease = Lease(self.default)
        try:
            return await lease.ready(patient=True)
        except errors.ModelFailed:
            # the path is not for clients, but the user who starts the server has given it
            path = self.default.model.path
            raise errors.ModelFailed(self.default.reason.replace("its file", path or "its file")) from None
        finally:
            lease.close()

    async def unload(self, name: str) -> tuple[ManagedModel, bool]:
        """Unloads a model, at once or when its running answers are finished.

        Returns the model and whether it was loaded; its `unload_pending` tells which of the two.
        """
        model = await self.lookup(name)
        return model, await model.unload()

    async def unregister(self, name: str) -> None:
        """Removes a model from the registry, and unloads it. Raises errors.BadRequest or RegistryError."""
        await asyncio.to_thread(self.catalog.forget, name)
        model = self._models.get(name)
        if model is None:
            return
        await model.unload()
        # another request may have removed it meanwhile, or use it again
        if self._models.get(name) is model and not model.n_leases and not model.loaded:
            del self._models[name]

    async def stop(self) -> None:
        """Ends all workers."""
        spawned = self.take_spawned()
        if spawned is not None:
            spawned.close()
        await asyncio.gather(*(model.end() for model in self.models), *self._noting, return_exceptions=True)

    def hurry(self) -> None:
        """Ends the workers that are being stopped, before they have saved."""
        for model in self.models:
            model.hurry()

    # -- for the models --------------------------------------------------------------------------

    async def refresh(self, name: str) -> Model:
        """The row of a model, after a look at its file. Raises errors.ModelNotFound."""
        return await asyncio.to_thread(self.catalog.current, name)

    def take_spawned(self) -> SpawnedWorker | None:
        """The process that was started ahead, once; else None."""
        spawned, self._spawned = self._spawned, None
        return spawned

    def share_cores(self) -> None:
        """Gives each busy worker its part of the cores, and again when one no longer counts as busy."""
        loop = asyncio.get_running_loop()
        now, linger = loop.time(), core_grants.LINGER_S
        workers = [model.worker for model in self.models if model.worker is not None]
        sharing = [worker for worker in workers if worker.busy_since(now - linger)]
        core_grants.grant_all(sharing, self._n_cores)
        if len(sharing) > 1 and self._sharing is None and not all(w.busy_since(now) for w in sharing):
            self._sharing = loop.call_later(linger, self._share_again)

    def _share_again(self) -> None:
        self._sharing = None
        self.share_cores()

    def notify_freed(self) -> None:
        """Wakes the loads that wait for memory."""
        self._freed.set()
        self._freed = asyncio.Event()

    def notify_loaded(self, model: Model, loaded: LastLoad) -> None:
        """Keeps what a load has shown in the registry, in the background."""
        if model.path:
            noting = asyncio.ensure_future(
                asyncio.to_thread(self.catalog.note_load, model.name, model.fingerprint, loaded)
            )
            self._noting.add(noting)
            noting.add_done_callback(self._noting.discard)

    def notify_done(self, name: str, done: wire.Done, choices: list[wire.ChoiceDone]) -> None:
        """Passes an answered request to `on_done`."""
        if self.on_done is not None:
            self.on_done(name, done, choices)

    async def make_room(self, model: ManagedModel) -> None:
        """Reserves a model's memory, and unloads or waits for others. Raises errors.Unavailable or a subclass."""
        while True:
            budget = self.budget()
            others = [
                Loaded(other.name, other.estimate.total, other.n_leases, other.last_used)
                for other in self.models
                if other.reserved
            ]
            decision = plan(others, model.estimate.total, budget)
            if decision.refuse and model.shed_cache():
                continue
            if decision.refuse:
                # a file that is larger than the machine's memory never fits
                hopeless = bool(self._budget) or model.model.size > (memory.capacity() or sys.maxsize)
                raise _too_large(model, budget, permanent=hopeless)
            if not decision.wait and not decision.unload:
                model.reserved = True
                return
            if decision.wait:
                freed = self._freed
                model.note_waiting("waits until another model is idle")
                await freed.wait()
                if not model.n_leases:
                    raise errors.ModelLoading("no request waits for the model any more")
            for name in decision.unload:
                log.info("unloading %s to make room for %s", name, model.name)
                chosen = self._models.get(name)  # it may have been removed while another was unloaded
                if chosen is not None:
                    await chosen.evict()


def _too_large(model: ManagedModel, budget: int, *, permanent: bool) -> errors.InsufficientMemory:
    """The refusal of a load that does not fit. Without a set budget, memory that is short now may be free soon."""
    message = f"the model {model.name!r} {model.estimate.shortage(budget, model.load.n_slots)}"
    return errors.InsufficientMemory(message) if permanent else errors.MemoryShortage(message)
