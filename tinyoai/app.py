"""The roof: builds everything from a Config, runs it, and takes it down in order.

Owns the event loop, the signals, what is printed at start, and the order of an end: stop accepting,
let answers finish within the grace time, end the rest, then the workers. It must not know how any
room does its work.
"""

import asyncio
import ipaddress
import logging
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from tinyoai import __version__, errors, gguf, wire
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
from tinyoai.web import api_keys, rate_limits
from tinyoai.web.access import Access
from tinyoai.web.exchange import Exchange
from tinyoai.web.request_head import Limits
from tinyoai.web.routing import Router
from tinyoai.web.server import Server

logger = logging.getLogger("tinyoai.app")

Number = TypeVar("Number", int, float)
_Address = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]
"""What getaddrinfo finds."""

BUILTIN = Path(__file__).parent / "builtin" / "tinyoai-chat.gguf"
MAX_CONNECTIONS = 1024
BACKLOG = 1024
"""Clients that may wait to be accepted; beyond that their kernels try again a second later."""
SPARE_FILES = 64
"""File descriptors kept for everything but clients: workers, logs, the listener."""
OPEN_ROUTES = ("/", "/health", "/docs", "/openapi.json")
"""What needs no key: health checks have none, and the documentation says nothing that is secret."""
EXPOSED_HEADERS = ("openai-processing-ms", "x-queue-ms", "x-should-retry")
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+/?", re.IGNORECASE)
"""Scheme, host and perhaps a port, as browsers send it: anything else would never match."""
PROGRESS_S = 1.0
"""Loading longer than this is told about."""


def run(config: Config) -> int:
    """Serves until told to stop; returns the exit code. Raises errors.UsageError if it cannot start."""
    log.setup(config.log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_App(config).serve())


def check(config: Config) -> None:
    """Raises errors.UsageError for what `run` would refuse before it opens or starts anything."""
    _addresses(config.host, config.port)
    _App(config)._guard()


def _catalog(config: Config) -> Catalog:
    """What there is to serve. Raises errors.UsageError for a model or a folder that cannot be read."""
    if config.models_dir and not Path(config.models_dir).is_dir():
        raise errors.UsageError(f"--models-dir: {config.models_dir} is no folder", exit_code=1)
    if config.models_dir and not os.access(config.models_dir, os.R_OK | os.X_OK):
        raise errors.UsageError(f"--models-dir: {config.models_dir} may not be read", exit_code=1)
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
        raise errors.UsageError(f"the model file {path} cannot be read: {reason}", exit_code=1) from None
    # another name for the built-in model is for this run: it must not stand in for a real model in the next
    return Catalog(model, folder=config.models_dir, register=bool(config.model) or name == BUILTIN.stem)


def _number(read: Callable[[str], Number], text: str, flag: str) -> Number:
    try:
        return read(text)
    except ValueError as error:
        raise errors.UsageError(f"{flag}: {text!r}: {error}") from None


def _wire_load(config: Config, model: Model) -> wire.Load:
    """What the model's worker is told."""
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
        wait_s=config.queue_timeout,
        n_gpu_layers=config.gpu_layers,
        pooling="" if config.pooling == "auto" else config.pooling,
    )


def _addresses(host: str, port: int) -> Sequence[_Address]:
    """What a host's name stands for. Raises errors.UsageError."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise errors.UsageError(f"--host: {host!r} is no address of this machine: {error}") from None


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises errors.UsageError naming the address and what to do."""
    family, kind, protocol, _, address = _addresses(host, port)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        advice = "; choose another with --port, or 0 for any free one" if error.errno == 98 else ""
        raise errors.UsageError(
            f"cannot listen on {host} port {port}: {error.strerror or error}{advice}", exit_code=1
        ) from None
    sock.setblocking(False)
    return sock


def _connections() -> int:
    """How many clients can be connected at once: as many as there are file descriptors for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, soft - SPARE_FILES)
    return MAX_CONNECTIONS


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _App:
    """One server's life."""

    def __init__(self, config: Config) -> None:
        # as set
        self._config = config
        self._keys = api_keys.read(config.api_key, config.api_key_file)
        # what it is built of
        self._pool = Pool(
            _catalog(config),
            partial(_wire_load, config),
            budget=_number(options.size, config.memory_budget, "--memory-budget")
            if config.memory_budget
            else 0,
            keep_alive=_number(options.seconds, config.keep_alive, "--keep-alive"),
            timeout=config.load_timeout,
        )
        self._load = self._pool.default.load
        self._models = Models(self._pool)
        self._finetunes = Finetunes(self._pool, config.home, config.chat_template)
        self._health = Health(self._pool)
        self._metrics = Metrics(self._pool)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def serve(self) -> int:
        """From the first socket to the last worker."""
        config = self._config
        guard = self._guard()
        sock = _listen(config.host, config.port)
        port = sock.getsockname()[1]
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        limits = Limits(body_bytes=config.max_body, connections=_connections())
        web = Server(self._router(), guard, limits, self._metrics.ended, _processing_ms)
        self._metrics.n_in_flight = lambda: web.n_busy
        listener = await loop.create_server(web.protocol_factory, sock=sock, backlog=BACKLOG)
        opening = asyncio.ensure_future(self._open())
        announcing: asyncio.Future[Path | None] | None = None
        try:
            ready = await self._first_load()
            if ready is not None:
                self._greet(ready, f"{url}/v1")
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
        """What is on disk: the registry first, since a job's model is looked for there."""
        await self._pool.open(self._config.home)
        await self._finetunes.jobs.open()

    # -- building --------------------------------------------------------------------------------

    def _router(self) -> Router:
        router = Router(prefixes=("/v1",), help_path="/docs")
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

    def _guard(self) -> Access:
        config = self._config
        for origin in config.cors_origin:
            if not ORIGIN.fullmatch(origin):
                raise errors.UsageError(
                    f"--cors-origin: {origin!r} is no origin: give scheme and host, such as "
                    "https://app.example, or * for any"
                )
        return Access(
            loopback=_is_loopback(config.host),
            allowed_hosts=config.allowed_host,
            origins=config.cors_origin,
            keys=self._keys,
            rate=rate_limits.parse(config.rate_limit),
            open_routes=OPEN_ROUTES,
            expose_headers=EXPOSED_HEADERS,
        )

    # -- starting --------------------------------------------------------------------------------

    async def _first_load(self) -> wire.Ready | None:
        """Loads the model, or None if told to stop meanwhile. Raises errors.UsageError if it is refused."""
        loading = asyncio.ensure_future(self._pool.first_load())
        stopping = asyncio.ensure_future(self._stop.wait())
        progress = asyncio.ensure_future(self._progress())
        try:
            await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                return None
            return loading.result()
        except errors.TinyoaiError as error:
            raise errors.UsageError(str(error), exit_code=1) from None
        finally:
            for task in (loading, stopping, progress):
                task.cancel()

    async def _progress(self) -> None:
        await asyncio.sleep(PROGRESS_S)
        while True:
            print(f"loading {self._load.path or self._load.name} ...", file=sys.stderr, flush=True)
            await asyncio.sleep(10 * PROGRESS_S)

    def _greet(self, ready: wire.Ready, url: str) -> None:
        size = f", {ready.file_size / 1e6:.1f} MB" if ready.file_size else ""
        parameters = f", {_short(ready.n_params)} parameters" if ready.n_params else ""
        body = (
            f'{{"model": "{ready.name}", "stream": true, "temperature": 0, '
            '"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
        )
        key = " -H 'Authorization: Bearer YOUR_KEY'" if self._keys else ""
        folder = self._config.models_dir
        lines = [
            f"tinyoai {__version__} is ready",
            f"  base URL  {url}",
            f"  model     {ready.name} ({ready.architecture}, {ready.quantization}{parameters}{size})",
            *([f"  more      the models in {folder}, loaded when asked for: {url}/models"] if folder else []),
            f"  context   {ready.n_ctx} tokens, {ready.n_slots} request{'s' if ready.n_slots > 1 else ''} at a time",
            f"  engine    {ready.engine}, {ready.n_threads} thread{'s' if ready.n_threads > 1 else ''}",
            f"  docs      {url.removesuffix('/v1')}/docs",
            "try it:",
            f"  curl -N {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
        ]
        if self._config.engine != "fake" and not self._config.model and not folder:
            lines.append("this model is a tiny demonstration; --model FILE serves one of yours")
        print("\n".join(lines), flush=True)
        trained = self._pool.default.model.context
        if 0 < trained < ready.n_ctx:
            logger.warning(
                "a context of %d tokens is longer than the %d that %s was trained with; "
                "what it says beyond those may make no sense",
                ready.n_ctx,
                trained,
                ready.name,
            )
        if not _is_loopback(self._config.host) and not self._keys:
            logger.warning(
                "ANYONE who can reach %s can use this server, for it asks for no key: "
                "set TINYOAI_API_KEY, or --api-key-file FILE, unless that is meant",
                self._config.host or "this machine",
            )
        if self._config.api_key_file and api_keys.exposed(self._config.api_key_file):
            logger.warning("everyone on this machine can read %s: chmod 600 it", self._config.api_key_file)

    def _announce(self, ready: wire.Ready, url: str, host: str, port: int) -> Path | None:
        """Lets `tinyoai status` know of this server; the file that does, None where there can be none."""
        try:
            server = instances.Running(
                process=instances.this(),
                version=__version__,
                host=host,
                port=port,
                server=url,
                since=time.time(),
                grace=self._config.grace,
                model=ready.name,
                architecture=ready.architecture,
                quantization=ready.quantization,
                n_ctx=ready.n_ctx,
                n_slots=ready.n_slots,
                file_size=ready.file_size,
                engine=ready.engine,
                n_gpu_layers=self._config.gpu_layers,
            )
            return instances.announce(server, datadir.folder(self._config.home))
        except errors.UsageError as error:
            logger.warning("%s; tinyoai status will not show this server", error)
            return None

    # -- ending ----------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _drain(self, web: Server) -> int:
        """Lets running answers finish. 0 if all did; 1 if the time was up or a second signal came."""
        self._health.draining = True
        web.begin_drain()
        idle = asyncio.ensure_future(web.wait_idle(self._config.grace))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({idle, hurry}, return_when=asyncio.FIRST_COMPLETED)
        finished = idle.done() and idle.result()
        for task in (idle, hurry):
            task.cancel()
        if not finished:
            logger.warning("ending with answers unfinished")
        return 0 if finished else 1


def _processing_ms(exchange: Exchange) -> list[tuple[str, str]]:
    return [("openai-processing-ms", f"{exchange.elapsed_ms:.3f}")]


def _short(count: int) -> str:
    """12345678 as 12.3 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
