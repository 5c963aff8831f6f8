"""The endpoints about models: what there is, how it runs, loading, unloading and forgetting.

Owns those answers' wording. A client names models and never files: only what the registry or --models-dir
holds can be loaded. It must not know how models are found, loaded or kept up.
"""

import asyncio
import time

from tinyoai import errors
from tinyoai.api import generation, schema
from tinyoai.host import memory
from tinyoai.models.pool import Entry, Pool, State
from tinyoai.models.registry import Model, RegistryError
from tinyoai.web.exchange import Exchange


class Models:
    """The endpoints."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def list(self, exchange: Exchange) -> None:
        """All models that can be asked, loaded or not."""
        await self._pool.look()
        cards = [self._card(model) for model in self._pool.catalog.view.models.values()]
        exchange.respond(200, generation.encode(schema.ModelList(data=cards)))

    async def one(self, exchange: Exchange) -> None:
        """One model, by its id or an alias. Raises errors.ModelNotFound."""
        await self._pool.look()
        entry = self._pool.find(exchange.route_params["id"])
        model = self._pool.catalog.view.models.get(entry.model.name, entry.model)
        exchange.respond(200, generation.encode(self._card(model)))

    async def status(self, exchange: Exchange) -> None:
        """How every known model is, those that cannot be served among them, and the memory they share."""
        await self._pool.look()
        view, entries = self._pool.catalog.view, {entry.model.name: entry for entry in self._pool.entries}
        known = [
            *((model, "unloaded", "") for model in view.models.values()),
            *((model, "missing", "its file is gone") for model in view.missing.values()),
            *((Model(name=name, path=""), "broken", why) for name, why in view.broken.items()),
        ]
        loaded = [entry for entry in entries.values() if entry.holds]
        pids = [entry.worker.pid for entry in loaded if entry.worker is not None]
        resident = await asyncio.to_thread(lambda: {pid: memory.resident(pid) for pid in pids})
        rows = []
        for model, state, why in known:
            entry = entries.get(model.name)
            if entry is None or (why and not entry.holds):
                rows.append(_resting(model, state, why))
            else:
                rows.append(self._running(model, entry, resident, why))
        body = schema.ModelsStatus(
            data=rows,
            memory=schema.MemoryStatus(
                budget_bytes=self._pool.budget(),
                reserved_bytes=sum(entry.need.total for entry in loaded),
                available_bytes=memory.available(),
            ),
            registry=schema.RegistryStatus(problem=self._pool.catalog.problem),
        )
        exchange.respond(200, generation.encode(body))

    async def load(self, exchange: Exchange) -> None:
        """Loads a model, and answers when it is loaded. Raises errors.ApiError where it cannot be."""
        request = schema.load_request(await exchange.read_body())
        name, keep_alive = schema.model_name(request), schema.keep_alive(request.keep_alive)
        started = asyncio.get_running_loop().time()
        entry, already = await self._pool.warm(name, keep_alive)
        spent = asyncio.get_running_loop().time() - started
        self._acted(exchange, entry, "already_loaded" if already else "loaded", spent)

    async def unload(self, exchange: Exchange) -> None:
        """Unloads a model: at once, or where it is in use with its last running answer."""
        request = schema.unload_request(await exchange.read_body())
        started = asyncio.get_running_loop().time()
        entry, loaded = await self._pool.unload(schema.model_name(request))
        spent = asyncio.get_running_loop().time() - started
        self._acted(
            exchange,
            entry,
            "not_loaded" if not loaded else "unloading" if entry.leaving else "unloaded",
            spent,
        )

    async def forget(self, exchange: Exchange) -> None:
        """Takes a model off the registry, and unloads it; its file stays. Raises errors.ApiError."""
        pool, name = self._pool, exchange.route_params["id"]
        await pool.look()
        view = pool.catalog.view
        if name not in view.models and name not in view.missing and name not in view.broken:
            pool.catalog.lookup(name)
            raise errors.BadRequest(f"{name!r} is an alias; name the model itself", param="id")
        try:
            await pool.forget(name)
        except RegistryError as error:
            raise errors.Unavailable(str(error), headers={"x-should-retry": "false"}) from None
        exchange.respond(200, generation.encode(schema.ModelDeleted(id=name)))

    # -- wording ---------------------------------------------------------------------------------

    def _card(self, model: Model) -> schema.Model:
        entry = next((entry for entry in self._pool.entries if entry.model.name == model.name), None)
        ready = entry.worker.ready if entry is not None and entry.worker is not None else None
        return schema.Model(
            id=model.name,
            created=model.created,
            model_id=model.id or None,
            type=model.kind,
            state=entry.state.value if entry is not None else State.UNLOADED.value,
            architecture=model.architecture,
            quantization=model.quantization,
            parameters=ready.n_params if ready is not None else model.parameters,
            context_length=ready.n_ctx if ready is not None else self._pool.planned_context(model),
            max_context_length=model.context,
            dimensions=ready.n_embd_out if ready is not None else None,
            pooling=(ready.pooling or None) if ready is not None else None,
            size_bytes=model.size,
            template=model.template,
            aliases=list(model.aliases),
            defaults=model.defaults,
        )

    def _running(
        self, model: Model, entry: Entry, resident: dict[int, int], why: str = ""
    ) -> schema.ModelStatus:
        loop, worker = asyncio.get_running_loop(), entry.worker
        status = _resting(model, entry.state.value, why or entry.why)
        status.memory = schema.ModelMemory(estimated_bytes=entry.need.total, resident_bytes=0)
        status.keep_alive = entry.keep_s
        status.in_use = entry.uses
        status.answers = entry.n_answers
        status.tokens_per_second = entry.tokens_per_second
        if entry.last_use:
            status.last_used = int(time.time() - (loop.time() - entry.last_use))
        if entry.timer is not None:
            status.unloads_in = round(max(0.0, entry.timer.when() - loop.time()), 3)
        if worker is not None and entry.state is State.READY:
            n_slots, n_busy = worker.ready.n_slots, worker.n_running
            status.pid = worker.pid
            status.uptime = round(loop.time() - entry.loaded_at, 3)
            status.memory.resident_bytes = resident.get(worker.pid, 0)
            status.slots = schema.Slots(total=n_slots, busy=n_busy, free=max(0, n_slots - n_busy))
            status.queue = max(0, worker.n_open - n_busy)
        return status

    def _acted(self, exchange: Exchange, entry: Entry, status: schema.Acted, spent_s: float) -> None:
        body = schema.ModelAction(
            status=status, name=entry.model.name, model=entry.model.name, seconds=round(spent_s, 3)
        )
        exchange.respond(200, generation.encode(body))


def _resting(model: Model, state: str, why: str = "") -> schema.ModelStatus:
    return schema.ModelStatus(
        id=model.name, model_id=model.id or None, type=model.kind, state=state, reason=why
    )
