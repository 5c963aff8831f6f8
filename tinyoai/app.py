"""The server: builds it from a Config, runs it, and stops it in order.

Stopping: accept no connections, let answers finish within the grace time, abort the rest, end the workers.
"""

import asyncio
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import uvloop

from tinyoai import __version__, errors, gguf, units, wire
from tinyoai.api.docs import Docs
from tinyoai.api.finetune import Finetunes
from tinyoai.api.health import Health
from tinyoai.api.metrics import Metrics
from tinyoai.api.models import Models
from tinyoai.api.openai.chat import Chat
from tinyoai.api.openai.completions import Completions
from tinyoai.api.openai.embeddings import Embeddings
from tinyoai.api.tokenizer import Tokens
from tinyoai.config import options
from tinyoai.config.options import Config
from tinyoai.host import datadir, instances, log
from tinyoai.models.catalog import Catalog, describe
from tinyoai.models.pool import Pool
from tinyoai.models.registry import Model
from tinyoai.models.spawn import SpawnedWorker
from tinyoai.web import api_keys, rate_limits
from tinyoai.web.access import Guard
from tinyoai.web.connection import Limits, Server
from tinyoai.web.listen import BACKLOG, addresses, is_loopback, listen, max_connections
from tinyoai.web.routing import Router

logger = logging.getLogger("tinyoai.app")

Number = TypeVar("Number", int, float)

BUILTIN = Path(__file__).parent / "builtin" / "tinyoai-chat.gguf"
OPEN_ROUTES = ("/", "/health", "/docs", "/openapi.json")
"""Paths that need no key: health checks have none, and the documentation contains no secrets."""
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+/?", re.IGNORECASE)
"""An origin as browsers send it: scheme, host and perhaps a port. Anything else would never match."""
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
    _App(config)._guard()


def _catalog(config: Config) -> Catalog:
    """The models to serve. Raises errors.UsageError for a file or folder that cannot be read."""
    if config.models_dir and not Path(config.models_dir).is_dir():
        raise errors.UsageError(f"--models-dir: {config.models_dir} is not a folder", exit_code=1)
    if config.models_dir and not os.access(config.models_dir, os.R_OK | os.X_OK):
        raise errors.UsageError(f"--models-dir: {config.models_dir} is not readable", exit_code=1)
    if config.engine == "fake":
        model = Model(name=config.model_name or "fake", path="", architecture="fake")
        return Catalog(model, folder=config.models_dir, register=False)
    path = Path(config.model) if config.model else BUILTIN
    name = config.model_name or path.stem
    try:
        model = describe(path.absolute(), name, model_type=config.model_type)
    except gguf.BadModelFile as error:
        raise errors.UsageError(str(error), exit_code=1) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise errors.UsageError(f"cannot read the model file {path}: {reason}", exit_code=1) from None
    # a registered second name of the built-in model would stand in for a real model in the next run
    return Catalog(model, folder=config.models_dir, register=bool(config.model) or name == BUILTIN.stem)


def _number(read: Callable[[str], Number], text: str, flag: str) -> Number:
    try:
        return read(text)
    except ValueError as error:
        raise errors.UsageError(f"{flag}: {text!r}: {error}") from None


def _wire_load(config: Config, model: Model) -> wire.Load:
    """The Load message for a model."""
    n_ctx = config.ctx_size or model.own_context or min(model.context, options.DEFAULT_CONTEXT)
    return wire.Load(
        path=model.path,
        name=model.name,
        engine=config.engine,
        model_type=model.architecture if model.shape is None else None,
        n_ctx=n_ctx,
        n_slots=config.parallel,
        n_batch=config.batch_size,
        n_threads=config.threads,
        n_queue=config.max_queue,
        queue_timeout_s=config.queue_timeout,
        n_gpu_layers=config.gpu_layers,
        pooling="" if config.pooling == "auto" else config.pooling,
        template=config.chat_template,
    )


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
        self._keys = api_keys.read(config.api_key, config.api_key_file)
        # parts
        self._pool = Pool(
            _catalog(config),
            partial(_wire_load, config),
            budget=_number(units.size, config.memory_budget, "--memory-budget")
            if config.memory_budget
            else 0,
            keep_alive=_number(units.seconds, config.keep_alive, "--keep-alive"),
            timeout=config.load_timeout,
            spawned=spawned,
        )
        self._load = self._pool.default.load
        self._models = Models(self._pool)
        self._finetunes = Finetunes(self._pool, config.home, config.chat_template)
        self._health = Health(self._pool)
        self._metrics = Metrics(self._pool)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        """A second signal: do not wait for answers."""

    async def serve(self) -> int:
        """Listens, loads the default model, serves until told to stop, and returns the exit code."""
        config = self._config
        guard = self._guard()
        sock = listen(config.host, config.port)
        port = sock.getsockname()[1]
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        limits = Limits(body_bytes=config.max_body, connections=max_connections())
        web = Server(self._router(), guard, limits, self._metrics.ended)
        self._metrics.n_in_flight = lambda: web.n_busy
        listener = await loop.create_server(web.protocol_factory, sock=sock, backlog=BACKLOG)
        opening = asyncio.ensure_future(self._open())
        announcing: asyncio.Future[Path | None] | None = None
        try:
            ready = await self._first_load()
            if ready is not None:
                self._on_ready(Serving(config, ready, f"{url}/v1", bool(self._keys)))
                announcing = asyncio.ensure_future(asyncio.to_thread(self._announce, ready, url, host, port))
                await self._stop.wait()
            listener.close()
            return await self._drain(web)
        finally:
            listener.close()
            web.abort()
            await asyncio.wait({opening})
            await self._finetunes.jobs.close()
            await self._pool.stop()
            if announcing is not None and (announced := await announcing):
                instances.withdraw(announced)
            self._pool.catalog.close()

    async def _open(self) -> None:
        """Opens the registry, then the fine-tuning jobs, which look up their models in it."""
        await self._pool.open(self._config.home)
        await self._finetunes.jobs.open()

    # -- building --------------------------------------------------------------------------------

    def _router(self) -> Router:
        router = Router()
        router.add("POST", "/v1/chat/completions", Chat(self._pool, self._config.chat_template))
        router.add("POST", "/v1/completions", Completions(self._pool))
        router.add("POST", "/v1/embeddings", Embeddings(self._pool))
        tokens = Tokens(self._pool, self._config.chat_template)
        router.add("POST", "/tokenize", tokens.tokenize)
        router.add("POST", "/detokenize", tokens.detokenize)
        router.add("GET", "/tokenizer_info", tokens.info)
        router.add("POST", "/apply-template", tokens.apply_template)
        router.add("GET", "/v1/models", self._models.list)
        router.add("GET", "/v1/models/status", self._models.status)
        router.add("POST", "/v1/models/load", self._models.load)
        router.add("POST", "/v1/models/unload", self._models.unload)
        router.add("GET", "/v1/models/{id:path}", self._models.one)
        router.add("DELETE", "/v1/models/{id:path}", self._models.forget)
        router.add("POST", "/api/finetune/start", self._finetunes.start)
        router.add("GET", "/api/finetune/jobs", self._finetunes.all)
        router.add("GET", "/api/finetune/status/{job_id:path}", self._finetunes.status)
        router.add("POST", "/api/finetune/stop/{job_id:path}", self._finetunes.stop)
        router.add("GET", "/health", self._health.ready)
        router.add("GET", "/health/live", self._health.live)
        router.add("GET", "/health/ready", self._health.ready)
        router.add("GET", "/metrics", self._metrics)
        docs = Docs(lambda: self._load.name)
        router.add("GET", "/openapi.json", docs.openapi)
        router.add("GET", "/", docs.home)
        router.add("GET", "/docs", docs.page)
        router.add("GET", "/docs/{name:path}", docs.file)
        return router

    def _guard(self) -> Guard:
        config = self._config
        for origin in config.cors_origin:
            if not ORIGIN.fullmatch(origin):
                raise errors.UsageError(
                    f"--cors-origin: {origin!r} is not an origin; give scheme and host, such as "
                    "https://app.example or chrome-extension://ID, or * for any"
                )
        return Guard(
            loopback=is_loopback(config.host),
            allowed_hosts=config.allowed_host,
            origins=config.cors_origin,
            keys=self._keys,
            rate=rate_limits.parse(config.rate_limit),
            open_routes=OPEN_ROUTES,
        )

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

    async def _drain(self, web: Server) -> int:
        """Lets running answers finish. 0 if all did; 1 after the grace time or at a second signal."""
        self._health.draining = True
        web.begin_drain()
        idle = asyncio.ensure_future(web.wait_idle(self._config.grace))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({idle, hurry}, return_when=asyncio.FIRST_COMPLETED)
        finished = idle.done() and idle.result()
        for task in (idle, hurry):
            task.cancel()
        if not finished:
            logger.warning("stopping with unfinished answers")
        return 0 if finished else 1
