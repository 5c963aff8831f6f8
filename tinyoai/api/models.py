"""The model endpoints: list, describe, status, load, unload and remove.

Clients name models and never files: only models in the registry or in --models-dir can be loaded.
"""

import asyncio
from pathlib import PurePath
from typing import Annotated, Literal

from msgspec import Meta, Struct

from tinyoai import errors
from tinyoai.api import decode
from tinyoai.api.adapters import LoraAdapter, listed
from tinyoai.api.decode import KeepAlive, ModelName
from tinyoai.host import memory
from tinyoai.models import registry
from tinyoai.models.managed_model import ManagedModel
from tinyoai.models.model_status import ModelStatus as Snapshot
from tinyoai.models.model_status import State
from tinyoai.models.pool import Pool
from tinyoai.models.registry import Defaults, DefaultSource, Kind, RegistryError
from tinyoai.web.exchange import Exchange

Action = Literal["loaded", "already_loaded", "unloaded", "unloading", "not_loaded"]
"""unloading: the model is in use, and is unloaded after its running answers."""
Capability = Literal["completion", "chat", "embedding", "rerank"]


class ModelRequest(Struct, kw_only=True):
    """The body of POST /v1/models/unload."""

    name: Annotated[
        ModelName | None, Meta(description="An id from `GET /v1/models`, in this field or in `model`.")
    ] = None
    model: Annotated[ModelName | None, Meta(description="The same as `name`.")] = None


class LoadRequest(ModelRequest, kw_only=True):
    """The body of POST /v1/models/load."""

    keep_alive: KeepAlive | None = None


class ModelMeta(Struct, kw_only=True):
    """Facts of a model under llama.cpp's names."""

    n_ctx: int
    """The served context window in tokens."""
    n_ctx_train: int
    """The context window of its training; 0: unknown."""
    n_params: int
    size: int
    """Bytes of its file."""


class Model(Struct, kw_only=True):
    """A model: OpenAI's four fields, and facts of its file. Lengths are in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tinyoai"
    model_id: int | None
    """Its number in the registry."""
    type: Kind
    state: str
    capabilities: list[Capability]
    """By its header and its last load. With some engines only a load shows whether it can embed."""
    engine: str
    """The engine that runs it."""
    architecture: str
    quantization: str
    parameters: int
    context_length: int
    """The served context window."""
    max_model_len: int
    """The served context window, under vLLM's name."""
    context_window: int
    """The served context window."""
    max_context_length: int
    """The context window of its training; 0: unknown."""
    dimensions: int | None
    """Numbers in its embeddings, by its last load; 0: it cannot embed; null: never loaded."""
    pooling: str | None
    """How token states become an embedding: mean, weighted-mean, last or cls. null: cannot embed, or never loaded."""
    size_bytes: int
    meta: ModelMeta
    template: str
    """A chat format, or the name of a Jinja file; auto: the model's own."""
    aliases: list[str]
    adapters: list[LoraAdapter]
    """The LoRA adapters that a request may name in `lora`."""
    defaults: Defaults
    """Values of request fields that a request leaves out."""
    default_sources: dict[str, DefaultSource]
    """Where the default of each field comes from: the settings file, the model file, or OpenAI's API."""


class ModelList(Struct, kw_only=True):
    """The answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class ModelMemory(Struct, kw_only=True):
    """Memory of a model. `estimated_bytes` is with all slots full, and counts against the budget."""

    estimated_bytes: int
    resident_bytes: int


class Slots(Struct, kw_only=True):
    """Requests that a model can answer at the same time."""

    total: int
    busy: int
    free: int


class ModelStatus(Struct, kw_only=True):
    """The status of a model. Times are in seconds; `last_used` is Unix time."""

    id: str
    model_id: int | None
    type: Kind
    state: str
    """loading, ready, waiting (for a restart), failed, unloaded, missing (its file is gone) or broken."""
    reason: str
    """The reason for this state; may be empty."""
    uptime: float | None = None
    pid: int | None = None
    """Of the worker process."""
    engine: str | None = None
    """The engine that runs it; null while it is not loaded."""
    threads: int | None = None
    """Threads that it may use for an evaluation; null before its first request. Busy models share the cores."""
    engine_version: str | None = None
    adapters: list[str] = []
    """The names of its LoRA adapters."""
    memory: ModelMemory | None = None
    reproducible: bool | None = None
    """Equal requests with temperature 0 or a seed get equal answers, in any company; null while it is not loaded."""
    slots: Slots | None = None
    queue: int = 0
    in_use: int = 0
    """Requests that use it now."""
    answers: int = 0
    tokens_per_second: float | None = None
    """Decode speed of one stream over its last answers."""
    last_used: int | None = None
    keep_alive: float | None = None
    """Seconds that it stays loaded without a request; -1: no limit."""
    unloads_in: float | None = None


class MemoryStatus(Struct, kw_only=True):
    """Memory of all models together: the budget, what loaded models reserve of it, and what the machine has left."""

    budget_bytes: int
    reserved_bytes: int
    available_bytes: int | None


class RegistryStatus(Struct, kw_only=True):
    """`problem` says why models are not registered beyond this run; it is empty if they are."""

    problem: str


class ModelsStatus(Struct, kw_only=True):
    """The answer of GET /v1/models/status."""

    object: Literal["list"] = "list"
    data: list[ModelStatus]
    memory: MemoryStatus
    registry: RegistryStatus


class ModelAction(Struct, kw_only=True):
    """The answer of POST /v1/models/load and /unload. `seconds` is the time that it took."""

    status: Action
    name: str
    model: str
    seconds: float


class ModelDeleted(Struct, kw_only=True):
    """The answer of DELETE /v1/models/{id}."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class Models:
    """The endpoints."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def list(self, exchange: Exchange) -> None:
        """Lists the models that can be used, loaded or not."""
        await self._pool.rescan()
        cards = [self._card(model) for model in self._pool.catalog.view.models.values()]
        exchange.respond(200, decode.encode(ModelList(data=cards)))

    async def one(self, exchange: Exchange) -> None:
        """Describes one model, by its id or an alias. Raises errors.ModelNotFound."""
        await self._pool.rescan()
        found = self._pool.find(exchange.route_params["id"])
        model = self._pool.catalog.view.models.get(found.name, found.model)
        exchange.respond(200, decode.encode(self._card(model)))

    async def status(self, exchange: Exchange) -> None:
        """Returns the status of every known model, with those that cannot be served, and of their memory."""
        await self._pool.rescan()
        view = self._pool.catalog.view
        known = [
            *((model, "unloaded", "") for model in view.models.values()),
            *((model, "missing", "its file is gone") for model in view.missing.values()),
            *((registry.Model(name=name, path=""), "broken", why) for name, why in view.broken.items()),
        ]
        snapshots = {model.name: model.status() for model in self._pool.models}
        reserved = [snapshot for snapshot in snapshots.values() if snapshot.reserved]
        pids = [snapshot.pid for snapshot in reserved if snapshot.pid is not None]
        resident = await asyncio.to_thread(lambda: {pid: memory.resident(pid) for pid in pids})
        rows = []
        for model, state, reason in known:
            snapshot = snapshots.get(model.name)
            row = ModelStatus(
                id=model.name, model_id=model.id or None, type=model.kind, state=state, reason=reason
            )
            if snapshot is not None and (not reason or snapshot.reserved):
                _fill(row, snapshot, resident)
            rows.append(row)
        body = ModelsStatus(
            data=rows,
            memory=MemoryStatus(
                budget_bytes=self._pool.budget(),
                reserved_bytes=sum(snapshot.estimated_bytes for snapshot in reserved),
                available_bytes=memory.available(),
            ),
            registry=RegistryStatus(problem=self._pool.catalog.problem),
        )
        exchange.respond(200, decode.encode(body))

    async def load(self, exchange: Exchange) -> None:
        """Loads a model and answers when it is loaded. Raises errors.ApiError if it cannot be loaded."""
        request = decode.decode(LoadRequest, await exchange.read_body())
        name, keep_alive = model_name(request), decode.keep_alive(request.keep_alive)
        started = asyncio.get_running_loop().time()
        model, already = await self._pool.preload(name, keep_alive)
        self._respond(exchange, model, "already_loaded" if already else "loaded", started)

    async def unload(self, exchange: Exchange) -> None:
        """Unloads a model, at once or after its running answers. Raises errors.ModelNotFound."""
        request = decode.decode(ModelRequest, await exchange.read_body())
        started = asyncio.get_running_loop().time()
        model, was_loaded = await self._pool.unload(model_name(request))
        action: Action = "unloading" if model.unload_pending else "unloaded"
        self._respond(exchange, model, action if was_loaded else "not_loaded", started)

    async def remove(self, exchange: Exchange) -> None:
        """Removes a model from the registry and unloads it; its file stays. Raises errors.ApiError."""
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
        exchange.respond(200, decode.encode(ModelDeleted(id=name)))

    def _card(self, model: registry.Model) -> Model:
        managed = next((managed for managed in self._pool.models if managed.name == model.name), None)
        snapshot = managed.status() if managed is not None else None
        info = snapshot.ready.info if snapshot is not None and snapshot.ready is not None else None
        planned = self._pool.make_load(model)
        n_ctx = info.n_ctx if info is not None else planned.n_ctx
        n_params = info.n_params if info is not None else model.n_params
        n_embd_out, pooling = None, ""
        if info is not None:
            n_embd_out, pooling = info.n_embd_out, info.pooling
        elif model.loaded is not None:
            n_embd_out, pooling = model.loaded.n_embd_out, model.loaded.pooling
        can_embed = model.can_embed if n_embd_out is None else n_embd_out > 0
        return Model(
            id=model.name,
            created=model.created,
            model_id=model.id or None,
            type=model.kind,
            state=(snapshot.state if snapshot is not None else State.UNLOADED).value,
            capabilities=_capabilities(model.kind, can_embed=can_embed, can_rank=model.can_rank),
            engine=info.engine if info is not None else model.engine,
            architecture=model.architecture,
            quantization=model.quantization,
            parameters=n_params,
            context_length=n_ctx,
            max_model_len=n_ctx,
            context_window=n_ctx,
            max_context_length=model.n_ctx_train,
            dimensions=n_embd_out,
            pooling=pooling or None,
            size_bytes=model.size,
            meta=ModelMeta(n_ctx=n_ctx, n_ctx_train=model.n_ctx_train, n_params=n_params, size=model.size),
            template=PurePath(planned.template).name,
            aliases=[*model.aliases],
            adapters=listed(planned.adapters),
            defaults=model.all_defaults,
            default_sources={name: model.default_source(name) for name in Defaults.__struct_fields__},
        )

    def _respond(self, exchange: Exchange, model: ManagedModel, action: Action, started: float) -> None:
        seconds = round(asyncio.get_running_loop().time() - started, 3)
        body = ModelAction(status=action, name=model.name, model=model.name, seconds=seconds)
        exchange.respond(200, decode.encode(body))


def model_name(request: ModelRequest) -> str:
    """Returns the named model. Raises errors.BadRequest if there is none, or two different ones."""
    name = request.name or request.model
    if name is None:
        raise errors.BadRequest("the field 'name' is required", param="name")
    if request.name and request.model and request.name != request.model:
        raise errors.BadRequest("name and model differ; send one of them", param="model")
    return name


def _capabilities(kind: Kind, *, can_embed: bool, can_rank: bool) -> "list[Capability]":
    found: list[Capability] = [] if kind in ("embedding", "rerank") else ["completion"]
    if kind == "chat":
        found.append("chat")
    if can_embed or kind == "embedding":
        found.append("embedding")
    if can_rank or kind == "rerank":
        found.append("rerank")
    return found


def _fill(row: ModelStatus, snapshot: Snapshot, resident: dict[int, int]) -> None:
    """Adds what only a model that was used has."""
    row.state = snapshot.state.value
    row.reason = row.reason or snapshot.reason
    row.memory = ModelMemory(estimated_bytes=snapshot.estimated_bytes, resident_bytes=0)
    row.keep_alive = snapshot.keep_alive_s
    row.in_use = snapshot.n_leases
    row.answers = snapshot.n_answers
    row.tokens_per_second = snapshot.tokens_per_second
    row.last_used = snapshot.last_used
    if snapshot.unloads_in_s is not None:
        row.unloads_in = round(snapshot.unloads_in_s, 3)
    if snapshot.pid is not None and snapshot.ready is not None:
        total, busy = snapshot.ready.n_slots, snapshot.n_running
        row.pid = snapshot.pid
        row.engine = snapshot.ready.info.engine
        row.threads = snapshot.n_threads or None
        row.engine_version = snapshot.ready.info.engine_version
        row.adapters = [str(adapter.name) for adapter in snapshot.ready.info.adapters]
        row.reproducible = snapshot.ready.reproducible
        row.uptime = round(snapshot.uptime_s, 3)
        row.memory.resident_bytes = resident.get(snapshot.pid, 0)
        row.slots = Slots(total=total, busy=busy, free=max(0, total - busy))
        row.queue = snapshot.n_queued
