"""Connections over real sockets: slow, rude, leaving, pipelining clients, and the end of a server."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tinyoai import errors
from tinyoai.web import sse
from tinyoai.web.access import Access
from tinyoai.web.server import Server
from tinyoai.web.exchange import Exchange
from tinyoai.web.request_head import Limits
from tinyoai.web.routing import Router

QUICK = Limits(
    head_s=0.4, body_s=0.6, idle_s=0.5, stall_s=0.6, linger_s=0.2, body_bytes=100_000, connections=20
)


class Bench:
    """A server with toy handlers, and what happened to them."""

    def __init__(self) -> None:
        self.port = 0
        self.server: Server
        self.cancelled = 0
        self.sent = 0

    async def echo(self, exchange: Exchange) -> None:
        """The body, back."""
        exchange.respond(200, await exchange.read_body())

    async def stream(self, exchange: Exchange) -> None:
        """Three events."""
        exchange.start_stream()
        for i in range(3):
            exchange.send(sse.event(b"%d" % i, exchange.chunked))
            await asyncio.sleep(0)
        exchange.end_stream()

    async def flood(self, exchange: Exchange) -> None:
        """Events without end."""
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
            await asyncio.sleep(3600)
        finally:
            self.cancelled += 1

    async def slow(self, exchange: Exchange) -> None:
        """Answers in a while."""
        await asyncio.sleep(0.5)
        exchange.respond(200, b"slow")

    async def broken(self, exchange: Exchange) -> None:
        """Has a fault."""
        raise RuntimeError("a secret detail of /etc")

    async def breaks_later(self, exchange: Exchange) -> None:
        """Has a fault in mid-stream."""
        exchange.start_stream()
        exchange.send(sse.event(b"1", exchange.chunked))
        raise RuntimeError("a secret detail of /etc")

    async def silent(self, exchange: Exchange) -> None:
        """Forgets to answer."""

    async def refuses(self, exchange: Exchange) -> None:
        """Refuses without reading."""
        raise errors.RateLimited("slow down", headers={"retry-after": "7"})


@asynccontextmanager
async def running(limits: Limits = QUICK) -> AsyncIterator[Bench]:
    """A bench that listens."""
    bench, router = Bench(), Router(prefixes=("/v1",))
    for method, path, handler in (
        ("POST", "/echo", bench.echo),
        ("GET", "/stream", bench.stream),
        ("GET", "/flood", bench.flood),
        ("GET", "/wait", bench.wait),
        ("GET", "/slow", bench.slow),
        ("GET", "/broken", bench.broken),
        ("GET", "/breaks-later", bench.breaks_later),
        ("GET", "/silent", bench.silent),
        ("POST", "/refuses", bench.refuses),
    ):
        router.add(method, path, handler)
    bench.server = Server(router, Access(loopback=True), limits, default_headers=lambda e: [("openai-processing-ms", "1")])
    listener = await asyncio.get_running_loop().create_server(bench.server.protocol_factory, "127.0.0.1", 0)
    bench.port = listener.sockets[0].getsockname()[1]
    try:
        yield bench
    finally:
        listener.close()
        bench.server.abort()
        await asyncio.sleep(0.05)


def run(test: Callable[[Bench], Awaitable[None]], limits: Limits = QUICK) -> None:
    """One test on a bench of its own."""

    async def main() -> None:
        async with running(limits) as bench:
            await asyncio.wait_for(test(bench), 20)

    asyncio.run(main())


async def talk(bench: Bench, *parts: bytes, pause: float = 0.0, eof: bool = False) -> bytes:
    """Sends parts and reads until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        if eof:
            writer.write_eof()
        return await reader.read()
    except ConnectionError:
        return b"reset"
    finally:
        writer.close()


def get(path: str, *lines: str, version: str = "1.1") -> bytes:
    """A GET's bytes."""
    return "\r\n".join([f"GET {path} HTTP/{version}", "Host: localhost", *lines, "", ""]).encode()


def post(path: str, body: bytes, *lines: str) -> bytes:
    """A POST's bytes."""
    head = "\r\n".join(
        [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *lines, "", ""]
    )
    return head.encode() + body


def statuses(data: bytes) -> list[int]:
    """The statuses of all responses in the data."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", data)]


def error(data: bytes) -> dict[str, Any]:
    """The error body of the only response."""
    body = json.loads(data.partition(b"\r\n\r\n")[2])
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


CLOSE = "Connection: close"


def test_an_echo_and_its_headers() -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, post("/echo", b"hello", CLOSE, "X-Request-ID: mine"))
        head, _, body = got.partition(b"\r\n\r\n")
        assert statuses(got) == [200]
        assert body == b"hello"
        for line in (
            b"content-length: 5",
            b"x-request-id: mine",
            b"openai-processing-ms: ",
            b"connection: close",
        ):
            assert line in head.lower()

    run(test)


@pytest.mark.parametrize("cut", [1, 2, 7, 50])
def test_bytes_may_come_in_any_pieces(cut: int) -> None:
    async def test(bench: Bench) -> None:
        data = post("/echo", b"hello world", CLOSE)
        got = await talk(bench, *[data[i : i + cut] for i in range(0, len(data), cut)], pause=0.001)
        assert got.endswith(b"hello world")

    run(test)


def test_chunked_bodies() -> None:
    async def test(bench: Bench) -> None:
        head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        got = await talk(bench, head, b"5\r\nhello\r\n", b"6\r\n world\r\n0\r\n\r\n", pause=0.01)
        assert got.endswith(b"hello world")

    run(test)


def test_pipelined_requests_are_answered_in_order_and_not_read_ahead() -> None:
    async def test(bench: Bench) -> None:
        data = post("/echo", b"one") + get("/slow") + get("/stream") + post("/echo", b"four", CLOSE)
        got = await talk(bench, data)
        assert statuses(got) == [200, 200, 200, 200]
        assert got.index(b"one") < got.index(b"slow") < got.index(b"data: 0") < got.index(b"four")

    run(test)


def test_a_thousand_pipelined_requests() -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, post("/echo", b"x") * 1000 + post("/echo", b"x", CLOSE))
        assert statuses(got) == [200] * 1001

    run(test)


def test_a_request_hidden_behind_another_is_answered_by_nobody() -> None:
    async def test(bench: Bench) -> None:
        smuggled = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        got = await talk(bench, smuggled + get("/stream"))
        assert statuses(got) == [400]

    run(test)


def test_http_1_0() -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, b"GET /stream HTTP/1.0\r\n\r\n")
        assert b"chunked" not in got.lower()
        assert got.endswith(b"data: 0\n\ndata: 1\n\ndata: 2\n\n")

    run(test)


def test_a_stream_keeps_the_connection() -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, get("/stream") + get("/stream", CLOSE))
        assert statuses(got) == [200, 200]
        assert got.count(b"0\r\n\r\n") >= 2

    run(test)


def test_options_and_head() -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, b"OPTIONS /echo HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert statuses(got) == [204]
        assert b"allow: OPTIONS, POST" in got or b"allow: POST, OPTIONS" in got
        got = await talk(bench, b"HEAD /slow HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b"content-length: 4" in got
        assert got.endswith(b"\r\n\r\n")

    run(test)


@pytest.mark.rule(26)
def test_100_continue_comes_when_it_is_due() -> None:
    async def test(bench: Bench) -> None:
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(head % (b"/echo", 2))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        writer.write(b"ok")
        assert (await reader.read()).endswith(b"ok")
        writer.close()
        # a refusal comes at once instead
        for path, length, status in ((b"/nowhere", 2, 404), (b"/refuses", 2, 429), (b"/echo", 10**7, 413)):
            assert statuses(await talk(bench, head % (path, length))) == [status]

    run(test)


# -- slow and rude clients -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([b"GET / HT"] + [b"T"] * 30, 408),
        ([b"GET /stream HTTP/1.1\r\nHost: localhost\r\n"] + [b"X: y\r\n"] * 30, 408),
        ([b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n"] + [b"x"] * 30, 408),
        (
            [b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"]
            + [b"1\r\nx\r\n"] * 30,
            408,
        ),
    ],
)
def test_a_client_that_dribbles_is_cut_off_in_all(parts: list[bytes], status: int) -> None:
    async def test(bench: Bench) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)

        async def dribble() -> None:
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.1)

        task = asyncio.ensure_future(dribble())
        got = await reader.read()
        assert not task.done(), "it was heard to its end"
        task.cancel()
        writer.close()
        assert statuses(got) == [status]
        assert error(got)["type"] == "timeout_error"

    run(test)


def test_a_client_that_says_nothing_is_closed() -> None:
    async def test(bench: Bench) -> None:
        assert await talk(bench) == b""
        got = await talk(bench, post("/echo", b"x"))  # and one that says nothing more
        assert statuses(got) == [200]

    run(test)


def test_a_body_over_the_limit_is_refused_while_it_comes() -> None:
    async def test(bench: Bench) -> None:
        assert statuses(await talk(bench, post("/echo", b"x" * 200_000))) == [413]
        head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunk = b"%x\r\n%b\r\n" % (30_000, b"x" * 30_000)
        assert statuses(await talk(bench, head, *[chunk] * 6)) == [413]
        assert statuses(await talk(bench, head, *[b"1\r\nx\r\n" * 1000] * 11)) == [413]
        assert statuses(await talk(bench, head, b"5\nhello\n0\n\n")) == [400]

    run(test)


def test_a_slow_reader_stops_the_stream_and_then_loses_it() -> None:
    async def test(bench: Bench) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect(("127.0.0.1", bench.port))
        sock.sendall(get("/flood"))
        await asyncio.sleep(0.3)
        paused_at = bench.sent
        await asyncio.sleep(0.15)
        assert bench.sent == paused_at, "the stream did not wait for its reader"
        await asyncio.sleep(1.0)
        assert bench.cancelled == 1
        sock.close()

    run(test)


@pytest.mark.parametrize("path", ["/wait", "/flood"])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_a_client_that_leaves_ends_its_handler_at_once(path: str, how: str) -> None:
    async def test(bench: Bench) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(get(path))
        await asyncio.sleep(0.1)
        if how == "reset":
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        if how == "half-close":
            writer.write_eof()
        else:
            writer.close()
        await asyncio.sleep(0.2)
        assert bench.cancelled == 1
        assert await bench.server.wait_idle(0.1)
        writer.close()
        del reader

    run(test)


def test_too_many_connections_are_told_so() -> None:
    async def test(bench: Bench) -> None:
        opened = [await asyncio.open_connection("127.0.0.1", bench.port) for _ in range(20)]
        got = await talk(bench)
        assert statuses(got) == [503]
        assert b"retry-after" in got
        for _, writer in opened:
            writer.close()
        await asyncio.sleep(0.1)
        assert statuses(await talk(bench, post("/echo", b"x", CLOSE))) == [200]

    run(test)


# -- faults --------------------------------------------------------------------------------------------


def test_a_fault_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, get("/broken", CLOSE, "X-Request-ID: abc"))
        assert statuses(got) == [500]
        assert b"secret" not in got
        assert error(got)["type"] == "internal_error"
        assert "abc" in error(got)["message"]
        got = await talk(bench, get("/breaks-later"))
        assert statuses(got) == [200]
        assert b"secret" not in got
        assert b'data: {"error"' in got
        assert b"[DONE]" not in got
        assert statuses(await talk(bench, get("/silent", CLOSE))) == [500]

    run(test)
    assert "abc" in caplog.text
    assert "secret" in caplog.text


def test_a_refusal_keeps_its_headers_and_the_connection_if_it_can() -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, post("/refuses", b"") + post("/refuses", b"", CLOSE))
        assert statuses(got) == [429, 429]
        assert got.count(b"retry-after: 7") == 2

    run(test)


def test_log_lines_cannot_be_forged() -> None:
    from tinyoai.host.log import MAX_LINE, clean

    assert clean("a\r\nb\x1b[2Jc") == "a\\r\\nb\\x1b[2Jc"
    assert len(clean("x" * 10**6)) < MAX_LINE + 10


# -- the end -------------------------------------------------------------------------------------------


def test_draining_lets_answers_finish_and_takes_no_more() -> None:
    async def test(bench: Bench) -> None:
        idle = await asyncio.open_connection("127.0.0.1", bench.port)
        answer = asyncio.ensure_future(talk(bench, get("/slow") + get("/stream")))
        await asyncio.sleep(0.1)
        bench.server.begin_drain()
        assert await idle[0].read() == b""
        assert await bench.server.wait_idle(5)
        got = await answer
        assert statuses(got) == [200]
        assert b"connection: close" in got
        idle[1].close()

    run(test)


def test_aborting_tells_those_who_wait() -> None:
    async def test(bench: Bench) -> None:
        waiting = asyncio.ensure_future(talk(bench, get("/wait")))
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(get("/flood"))
        await reader.readuntil(b"data: ")
        assert not await bench.server.wait_idle(0.05)
        bench.server.abort()
        assert statuses(await waiting) == [503]
        assert b'data: {"error"' in await reader.read()
        writer.close()
        assert bench.cancelled == 2

    run(test)
