"""A server with simple handlers and clients for it, for the tests of web."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from tinyoai import errors
from tinyoai.web import sse
from tinyoai.web.access import Access
from tinyoai.web.exchange import Exchange
from tinyoai.web.request_head import Limits
from tinyoai.web.routing import Handler, Router
from tinyoai.web.server import Server

LIMITS = Limits(body_bytes=100_000, connections=20)
CLOSE = "Connection: close"


class Bench:
    """A running server and a record of its handlers' calls."""

    def __init__(self) -> None:
        self.port = 0
        self.server: Server
        self.router = Router(prefixes=("/v1",))
        self.done: list[Exchange] = []
        self.cancelled = 0
        self.sent = 0
        for method, path, handler in (
            ("POST", "/echo", self.echo),
            ("GET", "/stream", self.stream),
            ("GET", "/flood", self.flood),
            ("GET", "/wait", self.wait),
            ("GET", "/slow", self.slow),
            ("GET", "/broken", self.broken),
            ("GET", "/breaks-later", self.breaks_later),
            ("GET", "/silent", self.silent),
            ("POST", "/refuses", self.refuses),
            ("POST", "/big", self.big),
        ):
            self.router.add(method, path, handler)

    async def echo(self, exchange: Exchange) -> None:
        """Answers with the body."""
        exchange.respond(200, await exchange.read_body())

    async def stream(self, exchange: Exchange) -> None:
        """Sends three events."""
        exchange.start_stream()
        for i in range(3):
            exchange.send(sse.event(b"%d" % i, exchange.chunked))
            await asyncio.sleep(0)
        exchange.end_stream()

    async def flood(self, exchange: Exchange) -> None:
        """Sends events without end."""
        exchange.start_stream()
        try:
            while True:
                exchange.send(sse.event(b"x" * 4096, exchange.chunked))
                self.sent += 1
                if exchange.congested:
                    await exchange.drain()
                await asyncio.sleep(0)
        finally:
            self.cancelled += 1

    async def wait(self, exchange: Exchange) -> None:
        """Never answers."""
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled += 1

    async def slow(self, exchange: Exchange) -> None:
        """Answers after five seconds."""
        await asyncio.sleep(5)
        exchange.respond(200, b"slow")

    async def big(self, exchange: Exchange) -> None:
        """Answers with 400 kB."""
        exchange.respond(200, b"x" * 400_000)

    async def broken(self, exchange: Exchange) -> None:
        """Fails."""
        raise RuntimeError("a secret detail of /etc")

    async def breaks_later(self, exchange: Exchange) -> None:
        """Fails in mid-stream."""
        exchange.start_stream()
        exchange.send(sse.event(b"1", exchange.chunked))
        raise RuntimeError("a secret detail of /etc")

    async def silent(self, exchange: Exchange) -> None:
        """Forgets to answer."""

    async def refuses(self, exchange: Exchange) -> None:
        """Refuses without reading the body."""
        raise errors.RateLimited("slow down", headers={"retry-after": "7"})


@asynccontextmanager
async def running(limits: Limits) -> AsyncIterator[Bench]:
    """Starts a bench and stops it afterwards."""
    bench = Bench()
    bench.server = Server(
        bench.router,
        Access(loopback=True),
        limits,
        bench.done.append,
        default_headers=lambda exchange: [("x-elapsed-ms", f"{exchange.elapsed_ms:.3f}")],
    )
    listener = await asyncio.get_running_loop().create_server(bench.server.protocol_factory, "127.0.0.1", 0)
    bench.port = listener.sockets[0].getsockname()[1]
    try:
        yield bench
    finally:
        listener.close()
        bench.server.abort()
        while bench.server.connections:
            await asyncio.sleep(1)


Test = Callable[[Bench], Awaitable[None]]


class Runner:
    """Runs each test on its own bench, on one kind of event loop."""

    def __init__(self, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self._loop = loop

    def __call__(
        self, test: Test, limits: Limits = LIMITS, routes: dict[tuple[str, str], Handler] | None = None
    ) -> None:
        """Runs one test, which may take a virtual hour."""

        async def main() -> None:
            async with running(limits) as bench:
                for (method, path), handler in (routes or {}).items():
                    bench.router.add(method, path, handler)
                await asyncio.wait_for(test(bench), 3600)

        with asyncio.Runner(loop_factory=self._loop) as runner:
            runner.run(main())


def now() -> float:
    """Returns the loop's virtual time."""
    return asyncio.get_running_loop().time()


async def settle() -> None:
    """Returns once nothing more happens on any socket."""
    await asyncio.sleep(0.001)


async def talk(bench: Bench, *parts: bytes, pause: float = 0.0) -> bytes:
    """Sends the parts and returns all bytes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        return await reader.read()
    except ConnectionError:
        return b"reset"
    finally:
        writer.close()


async def narrow_client(bench: Bench) -> socket.socket:
    """Returns a connected Unix socket with small buffers, which hold exactly as much as they are set to."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
    ours.setblocking(False)
    await asyncio.get_running_loop().connect_accepted_socket(bench.server.protocol_factory, theirs)
    return ours


def tcp_client(bench: Bench, window: int = 4096) -> socket.socket:
    """Returns a connected TCP client with a small receive buffer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    sock.connect(("127.0.0.1", bench.port))
    sock.setblocking(False)
    return sock


def get(path: str, *lines: str, version: str = "1.1") -> bytes:
    """Returns the bytes of a GET request."""
    return "\r\n".join([f"GET {path} HTTP/{version}", "Host: localhost", *lines, "", ""]).encode()


def post(path: str, body: bytes, *lines: str) -> bytes:
    """Returns the bytes of a POST request."""
    head = "\r\n".join(
        [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *lines, "", ""]
    )
    return head.encode() + body


def statuses(data: bytes) -> list[int]:
    """Returns the statuses of all responses in the data."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", data)]


def error(data: bytes) -> dict[str, Any]:
    """Returns the `error` object of the only response."""
    body = json.loads(data.partition(b"\r\n\r\n")[2])
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])
