"""The server: builds it from a Config, runs it, and stops it in order.

Starting: check the configuration, bind the port, begin to load the model, and import the API meanwhile.
Stopping: accept no connections, let answers finish within the grace time, abort the rest, end the workers.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import uvloop
from msgspec import structs

from tinyoai import __version__, errors, gguf, units, wire
from tinyoai.config.options import Config
from tinyoai.engine import facts
from tinyoai.host import cache_files, datadir, instances, log, memory
from tinyoai.models import adapter_files, template_file
from tinyoai.models.catalog import Catalog, describe
from tinyoai.models.pool import Pool
from tinyoai.models.registry import Model
from tinyoai.models.spawn import SpawnedWorker
from tinyoai.web.listen import BACKLOG, addresses, listen

# the API is not needed to begin the load; it is imported meanwhile, see `serve`
if TYPE_CHECKING:
    from tinyoai.api.assembly import Api
    from tinyoai.web.api_keys import Keys

logger = logging.getLogger("tinyoai.app")

Number = TypeVar("Number", int, float)

BUILTIN = Path(__file__).parent / "builtin" / "tinyoai-chat.gguf"
MAX_CACHE_RAM = 1 << 30
"""Bytes of host memory for a model's finished conversations where nobody chose a number, at most."""
PROGRESS_S = 1.0
"""A longer load is announced."""


class Serving(NamedTuple):
    """A server that is ready."""

    config: Config
    ready: wire.Ready
    base_url: str
    requires_key: bool


def run(
    config: Config,
    *,
    spawned: SpawnedWorker | None = None,
    on_ready: Callable[[Serving], None] = lambda serving: None,
) -> int:
    """Serves until told to stop, and returns the exit code. Raises errors.UsageError if it cannot start.

    `spawned` is a worker process for the first load; the caller closes it. `on_ready` is called once the default
    model is loaded.
    """
    log.setup(config.log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_App(config, spawned, on_ready).serve())


def check(config: Config) -> None:
    """Raises errors.UsageError for a configuration that `run` would refuse. Starts nothing and binds no port."""
    addresses(config.host, config.port)
    _App(config)._build_api()


def _catalog(config: Config) -> Catalog:
    """The models to serve. Raises errors.UsageError for a file or folder that cannot be read."""
    if config.models_dir and not Path(config.models_dir).is_dir():
        raise errors.UsageError(f"--models-dir: {config.models_dir} is not a folder", exit_code=1)
    if config.models_dir and not os.access(config.models_dir, os.R_OK | os.X_OK):
        raise errors.UsageError(f"--models-dir: {config.models_dir} is not readable", exit_code=1)
    lora = _read_lora(config)
    if config.engine == "fake":
        model = Model(name=config.model_name or "fake", path="", architecture="fake", can_rank=True)
        return Catalog(model, folder=config.models_dir, register=False, engine="fake")
    path = Path(config.model) if config.model else BUILTIN
    name = config.model_name or gguf.stem(path)
    try:
        model = describe(path.absolute(), name, model_type=config.model_type, engine=config.engine, lora=lora)
    except gguf.BadModelFile as error:
        raise errors.UsageError(str(error), exit_code=1) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise errors.UsageError(f"cannot read the model file {path}: {reason}", exit_code=1) from None
    # a registered second name of the built-in model would stand in for a real model in the next run
    register = bool(config.model) or name == BUILTIN.stem
    return Catalog(model, folder=config.models_dir, register=register, engine=config.engine, lora=lora)


def _read_lora(config: Config) -> tuple[adapter_files.AdapterSettings, ...]:
    """The adapters of --lora. Raises errors.UsageError."""
    if config.lora and config.engine == "fake":
        raise errors.UsageError("--lora: the fake engine applies no LoRA adapters; leave it out")
    try:
        return adapter_files.from_flags(config.lora)
    except ValueError as error:
        raise errors.UsageError(f"--lora: {error}", exit_code=1) from None


def _read_keys(config: Config) -> "Keys | None":
    """The API keys; None without any."""
    if not (config.api_key or config.api_key_file):
        return None
    from tinyoai.web import api_keys

    return api_keys.read(config.api_key, config.api_key_file)


def _number(read: Callable[[str], Number], text: str, flag: str) -> Number:
    try:
        return read(text)
    except ValueError as error:
        raise errors.UsageError(f"{flag}: {text!r}: {error}") from None


def _check_cache(config: Config) -> None:
    """Raises errors.UsageError for a KV cache that needs what is turned off."""
    if config.flash_attn == "off" and config.cache_type_v not in facts.PLAIN_CACHE_TYPES:
        raise errors.UsageError(
            f"--cache-type-v: {config.cache_type_v} needs flash attention; turn it on with --flash-attn auto, or "
            "choose f16"
        )
    if config.reproducible and config.kv == "unified":
        raise errors.UsageError(
            "--reproducible: results would depend on how requests share KV cells; leave out --kv unified"
        )


def _read_template(config: Config) -> str:
    """The source of --chat-template, if it is a file. Raises errors.UsageError."""
    if not template_file.is_file(config.chat_template):
        return ""
    try:
        return template_file.read(config.chat_template)
    except template_file.BadTemplateFile as error:
        raise errors.UsageError(f"--chat-template: {error}") from None


def _wire_load(config: Config, capacity: int, template_source: str, model: Model) -> wire.Load:
    """The Load message for a model. Its own template counts where `config` names none.

    `capacity` is the memory in bytes that a default context window is cut to.
    """
    template = model.template if config.chat_template == "auto" else config.chat_template
    if template_file.is_file(template) and not template_source:
        with contextlib.suppress(template_file.BadTemplateFile):  # the worker refuses the load in words
            template_source = template_file.read(template)
    reproducible = config.reproducible or model.reproducible
    load = wire.Load(
        path=model.path,
        name=model.name,
        engine=model.engine if config.engine == facts.AUTO else config.engine,
        model_type=model.architecture if model.hparams is None else None,
        n_ctx=config.ctx_size or model.n_ctx_override,
        n_slots=config.parallel,
        n_batch=config.batch_size,
        n_threads=config.threads,
        n_queue=config.max_queue,
        queue_timeout_s=config.queue_timeout,
        n_gpu_layers=config.gpu_layers,
        pooling="" if config.pooling == "auto" else config.pooling,
        template=template,
        template_source=template_source,
        cache_type_k=config.cache_type_k,
        cache_type_v=config.cache_type_v,
        flash_attn=config.flash_attn,
        mmap=not config.no_mmap,
        mlock=config.mlock,
        kv="separate" if reproducible else config.kv,
        reproducible=reproducible,
        state_dir=_state_dir(config) if reproducible else "",
        adapters=model.adapters,
    )
    load = facts.complete(load, model.hparams, model.n_ctx_train, capacity, model.size)
    return _with_cache(config, load, model, capacity)


def _with_cache(config: Config, load: wire.Load, model: Model, capacity: int) -> wire.Load:
    """The load with the limits of its prefix cache. Raises errors.UsageError for a wrong size.

    In memory that is an eighth of `capacity` where nobody chose a size, but no more than half of what the model leaves.
    """
    ram = _number(units.size, config.cache_ram, "--cache-ram") if config.cache_ram else None
    disk = _number(units.size, config.cache_disk, "--cache-disk")
    engine = facts.ENGINES.get(load.engine)
    if engine is None or not engine.saves or (model.hparams is not None and model.hparams.whole_rows):
        return load
    if ram is None:
        left = capacity - engine.estimate(model.hparams, model.size, load).total
        ram = max(0, min(MAX_CACHE_RAM, capacity // 8, left // 2))
    folder = ""
    if disk:
        with contextlib.suppress(errors.UsageError):  # a user without a home directory
            folder = str(datadir.folder(config.home) / cache_files.FOLDER)
    return structs.replace(load, cache_ram=ram, cache_disk=disk, cache_dir=folder)


def _scope_salt(config: Config) -> bytes | None:
    """The salt of the scopes of API keys; None: it cannot be kept, and prompts of before a restart are not found."""
    with contextlib.suppress(OSError, errors.UsageError):
        return cache_files.salt(datadir.folder(config.home) / cache_files.FOLDER)
    return None


def _state_dir(config: Config) -> str:
    """The data directory; empty for a user without a home directory."""
    try:
        return str(datadir.folder(config.home))
    except errors.UsageError:
        return ""


def _ignore_result(task: "asyncio.Future[wire.Ready | None]") -> None:
    """Retrieves a task's exception, so that asyncio does not log it."""
    if not task.cancelled():
        task.exception()


class _App:
    """One server, from its configuration to its end."""

    def __init__(
        self,
        config: Config,
        spawned: SpawnedWorker | None = None,
        on_ready: Callable[[Serving], None] = lambda serving: None,
    ) -> None:
        # settings
        self._config = config
        self._on_ready = on_ready
        self._keys = _read_keys(config)
        _check_cache(config)
        # parts
        budget = _number(units.size, config.memory_budget or "0", "--memory-budget")
        self._pool = Pool(
            _catalog(config),
            partial(_wire_load, config, budget or memory.capacity() or sys.maxsize, _read_template(config)),
            budget=budget,
            keep_alive=_number(units.seconds, config.keep_alive, "--keep-alive"),
            timeout=config.load_timeout,
            spawned=spawned,
        )
        self._load = self._pool.default.load
        if spawned is not None:
            with contextlib.suppress(OSError):  # its process has ended: the first load starts another
                spawned.send(self._load)
        self._api: Api | None = None
        # signals
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        """A second signal: do not wait for answers."""

    async def serve(self) -> int:
        """Listens, loads the default model, serves until told to stop, and returns the exit code."""
        config = self._config
        sock = listen(config.host, config.port)
        port = sock.getsockname()[1]
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        loading = asyncio.ensure_future(self._first_load())
        opening: asyncio.Future[None] | None = None
        announcing: asyncio.Future[Path | None] | None = None
        listener: asyncio.Server | None = None
        try:
            if self._keys and not config.cache_shared and (salt := _scope_salt(config)):
                self._keys.use_salt(salt)
            # the worker loads meanwhile: these imports take as long as a small model
            api = self._build_api()
            listener = await loop.create_server(api.server.protocol_factory, sock=sock, backlog=BACKLOG)
            opening = asyncio.ensure_future(self._open())
            ready = await loading
            if ready is not None:
                self._on_ready(Serving(config, ready, f"{url}/v1", bool(self._keys)))
                announcing = asyncio.ensure_future(asyncio.to_thread(self._announce, ready, url, host, port))
                await self._stop.wait()
            listener.close()
            return await self._drain(api)
        finally:
            loading.cancel()
            loading.add_done_callback(_ignore_result)  # an earlier error is the one to report
            if listener is not None:
                listener.close()
            sock.close()
            if self._api is not None:
                self._api.server.abort()
                if opening is not None:
                    await asyncio.wait({opening})
                    await self._api.finetunes.jobs.close()
            await self._stop_pool()
            if announcing is not None and (announced := await announcing):
                instances.withdraw(announced)
            self._pool.catalog.close()

    async def _open(self) -> None:
        """Opens the registry, then the fine-tuning jobs, which look up their models in it."""
        await self._pool.open(self._config.home)
        if self._api is not None:
            await self._api.finetunes.jobs.open()

    # -- building --------------------------------------------------------------------------------

    def _build_api(self) -> "Api":
        """Raises errors.UsageError for a wrong origin or rate limit."""
        from tinyoai.api import assembly
        from tinyoai.web.api_keys import Keys

        self._api = assembly.build(self._pool, self._config, self._keys or Keys())
        return self._api

    # -- starting --------------------------------------------------------------------------------

    async def _first_load(self) -> wire.Ready | None:
        """Loads the default model; None if told to stop meanwhile. Raises errors.UsageError if it cannot."""
        loading = asyncio.ensure_future(self._pool.first_load())
        stopping = asyncio.ensure_future(self._stop.wait())
        progress = asyncio.ensure_future(self._print_progress())
        try:
            await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return loading.result() if loading.done() else None
        except errors.TinyoaiError as error:
            raise errors.UsageError(str(error), exit_code=1) from None
        finally:
            for task in (loading, stopping, progress):
                task.cancel()

    async def _print_progress(self) -> None:
        await asyncio.sleep(PROGRESS_S)
        while True:
            print(f"loading {self._load.path or self._load.name} ...", file=sys.stderr, flush=True)
            await asyncio.sleep(10 * PROGRESS_S)

    def _announce(self, ready: wire.Ready, url: str, host: str, port: int) -> Path | None:
        """Writes this server's record for `tinyoai status`, and returns its path; None if it cannot."""
        try:
            record = instances.InstanceRecord(
                process=instances.current_process(),
                version=__version__,
                host=host,
                port=port,
                url=url,
                since=time.time(),
                grace=self._config.grace,
                model=ready.info.name,
                architecture=ready.info.architecture,
                quantization=ready.info.quantization,
                n_ctx=ready.info.n_ctx,
                n_slots=ready.n_slots,
                file_size=ready.info.file_size,
                engine=ready.info.engine,
                engine_version=ready.info.engine_version,
                flash_attention=ready.info.engine == "llamacpp" and self._config.flash_attn != "off",
                n_gpu_layers=self._config.gpu_layers,
            )
            return instances.announce(record, datadir.folder(self._config.home))
        except errors.UsageError as error:
            logger.warning("%s; tinyoai status will not show this server", error)
            return None

    # -- stopping --------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _stop_pool(self) -> None:
        """Ends the workers. They may save what they have computed, until a second signal."""
        stopping = asyncio.ensure_future(self._pool.stop())
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not stopping.done():
            self._pool.hurry()
        await stopping

    async def _drain(self, api: "Api") -> int:
        """Lets running answers finish. 0 if all did; 1 after the grace time or at a second signal."""
        api.health.draining = True
        api.server.begin_drain()
        idle = asyncio.ensure_future(api.server.wait_idle(self._config.grace))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({idle, hurry}, return_when=asyncio.FIRST_COMPLETED)
        finished = idle.done() and idle.result()
        for task in (idle, hurry):
            task.cancel()
        if not finished:
            logger.warning("stopping with unfinished answers")
        return 0 if finished else 1
