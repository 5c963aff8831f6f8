"""The endpoints about models: what there is, how it runs, loading, unloading and forgetting.

Owns those answers' wording. A client names models and never files: only what the registry or --models-dir
holds can be loaded. It must not know how models are found, loaded or kept up.
"""

import asyncio

from tinyoai import errors
from tinyoai.api import generation, schema
from tinyoai.host import memory
from tinyoai.models.managed_model import ManagedModel
from tinyoai.models.model_status import ModelStatus, State
from tinyoai.models.pool import Pool
from tinyoai.models.registry import Model, RegistryError
from tinyoai.web.exchange import Exchange


class Models:
    """The endpoints."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def list(self, exchange: Exchange) -> None:
        """All models that can be asked, loaded or not."""
        await self._pool.rescan()
        cards = [self._card(model) for model in self._pool.catalog.view.models.values()]
        exchange.respond(200, generation.encode(schema.ModelList(data=cards)))

    async def one(self, exchange: Exchange) -> None:
        """One model, by its id or an alias. Raises errors.ModelNotFound."""
        await self._pool.rescan()
        entry = self._pool.find(exchange.route_params["id"])
        model = self._pool.catalog.view.models.get(entry.name, entry.model)
        exchange.respond(200, generation.encode(self._card(model)))

    async def status(self, exchange: Exchange) -> None:
        """How every known model is, those that cannot be served among them, and the memory they share."""
        await self._pool.rescan()
        view, managed = self._pool.catalog.view, {model.name: model for model in self._pool.models}
        known = [
            *((model, "unloaded", "") for model in view.models.values()),
            *((model, "missing", "its file is gone") for model in view.missing.values()),
            *((Model(name=name, path=""), "broken", why) for name, why in view.broken.items()),
        ]
        statuses = {name: model.status() for name, model in managed.items()}
        pids = [status.pid for status in statuses.values() if status.pid is not None]
        resident = await asyncio.to_thread(lambda: {pid: memory.resident(pid) for pid in pids})
        rows = []
        for model, state, why in known:
            status = statuses.get(model.name)
            if status is None or (why and not status.reserved):
                rows.append(_resting(model, state, why))
            else:
                rows.append(_running(model, status, resident, why))
        body = schema.ModelsStatus(
            data=rows,
            memory=schema.MemoryStatus(
                budget_bytes=self._pool.budget(),
                reserved_bytes=sum(s.estimated_bytes for s in statuses.values() if s.reserved),
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
        entry, already = await self._pool.preload(name, keep_alive)
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
            "not_loaded" if not loaded else "unloading" if entry.unload_pending else "unloaded",
            spent,
        )

    async def forget(self, exchange: Exchange) -> None:
        """Takes a model off the registry, and unloads it; its file stays. Raises errors.ApiError."""
        pool, name = self._pool, exchange.route_params["id"]
        await pool.rescan()
        view = pool.catalog.view
        if name not in view.models and name not in view.missing and name not in view.broken:
            pool.catalog.lookup(name)
            raise errors.BadRequest(f"{name!r} is an alias; name the model itself", param="id")
        try:
            await pool.unregister(name)
        except RegistryError as error:
            raise errors.Unavailable(str(error), headers={"x-should-retry": "false"}) from None
        exchange.respond(200, generation.encode(schema.ModelDeleted(id=name)))

    # -- wording ---------------------------------------------------------------------------------

    def _card(self, model: Model) -> schema.Model:
        managed = next((m for m in self._pool.models if m.name == model.name), None)
        status = managed.status() if managed is not None else None
        info = status.ready.info if status is not None and status.ready is not None else None
        n_ctx = info.n_ctx if info is not None else self._pool.planned_context(model)
        return schema.Model(
            id=model.name,
            created=model.created,
            model_id=model.id or None,
            type=model.kind,
            state=managed.state.value if managed is not None else State.UNLOADED.value,
            architecture=model.architecture,
            quantization=model.quantization,
            parameters=info.n_params if info is not None else model.parameters,
            context_length=n_ctx,
            max_context_length=model.context,
            dimensions=info.n_embd_out if info is not None else None,
            pooling=(info.pooling or None) if info is not None else None,
            size_bytes=model.size,
            template=model.template,
            aliases=list(model.aliases),
            defaults=model.defaults,
        )

    def _acted(self, exchange: Exchange, entry: ManagedModel, status: schema.Acted, spent_s: float) -> None:
        body = schema.ModelAction(status=status, name=entry.name, model=entry.name, seconds=round(spent_s, 3))
        exchange.respond(200, generation.encode(body))


def _running(
    model: Model, status: ModelStatus, resident: dict[int, int], why: str = ""
) -> schema.ModelStatus:
    row = _resting(model, status.state.value, why or status.reason)
    row.memory = schema.ModelMemory(estimated_bytes=status.estimated_bytes, resident_bytes=0)
    row.keep_alive = status.keep_alive_s
    row.in_use = status.n_leases
    row.answers = status.n_answers
    row.tokens_per_second = status.tokens_per_second
    row.last_used = status.last_used
    if status.unloads_in_s is not None:
        row.unloads_in = round(status.unloads_in_s, 3)
    if status.pid is not None and status.ready is not None:
        n_slots, n_busy = status.ready.n_slots, status.n_running
        row.pid = status.pid
        row.uptime = round(status.uptime_s, 3)
        row.memory.resident_bytes = resident.get(status.pid, 0)
        row.slots = schema.Slots(total=n_slots, busy=n_busy, free=max(0, n_slots - n_busy))
        row.queue = status.n_queued
    return row


def _resting(model: Model, state: str, why: str = "") -> schema.ModelStatus:
    return schema.ModelStatus(
        id=model.name, model_id=model.id or None, type=model.kind, state=state, reason=why
    )
