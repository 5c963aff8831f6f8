"""What one connection can take from the others: time, memory, order and the books, on both event loops."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

from tests.web.test_server import CLOSE, QUICK, Bench, error, get, post, running, statuses, talk
from tinyoai import errors
from tinyoai.web import sse
from tinyoai.web.exchange import Exchange
from tinyoai.web.request_head import Limits

Test = Callable[[Bench], Awaitable[None]]
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class Clerk:
    """Runs a test on a bench, with the loop of its parameter."""

    def __init__(self, loop: Callable[[], Any]) -> None:
        self._loop = loop

    def __call__(self, test: Test, limits: Limits = QUICK) -> None:
        """One test; it may take 20 seconds."""

        async def main() -> None:
            async with running(limits) as bench:
                await asyncio.wait_for(test(bench), 20)

        with asyncio.Runner(loop_factory=self._loop) as runner:
            runner.run(main())


@pytest.fixture(params=sorted(LOOPS))
def run(request: pytest.FixtureRequest) -> Clerk:
    """On asyncio's loop, and on the one that users get."""
    return Clerk(LOOPS[request.param])


def small_window(bench: Bench, size: int = 4096) -> socket.socket:
    """A connection of a client that takes little at a time."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    sock.connect(("127.0.0.1", bench.port))
    sock.setblocking(False)
    return sock


# -- time ----------------------------------------------------------------------------------------------


def test_empty_lines_keep_no_connection_open(run: Clerk) -> None:
    async def test(bench: Bench) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)

        async def dribble() -> None:
            for _ in range(60):
                writer.write(b"\r\n")
                await asyncio.sleep(0.1)

        dribbling = asyncio.ensure_future(dribble())
        await reader.read()
        assert not dribbling.done(), "the server let itself be kept waiting"
        dribbling.cancel()
        writer.close()

    run(test)


def test_half_a_request_behind_another_has_a_head_s_time(run: Clerk) -> None:
    async def test(bench: Bench) -> None:
        assert statuses(await talk(bench, post("/echo", b"x") + b"GET / HT")) == [200, 408]

    run(test, Limits(head_s=0.3, idle_s=3600, linger_s=0.1))


def test_the_first_head_s_time_runs_from_the_accept(run: Clerk) -> None:
    async def test(bench: Bench) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        loop = asyncio.get_running_loop()
        (connection,) = bench.server.connections or await _soon(bench)
        due = connection._timer.when()  # type: ignore[union-attr]
        writer.write(b"GET ")
        await asyncio.sleep(0.1)
        assert connection._timer is not None
        assert connection._timer.when() == due
        assert due - loop.time() < 5
        writer.close()
        del reader

    run(test, Limits(head_s=5))


async def _soon(bench: Bench) -> set[Any]:
    while not bench.server.connections:
        await asyncio.sleep(0.01)
    return bench.server.connections


def test_a_slow_reader_who_reads_keeps_its_stream(run: Clerk) -> None:
    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        sock = small_window(bench, 16384)
        await loop.sock_sendall(sock, get("/flood"))
        await asyncio.sleep(0.2)
        for _ in range(40):  # four times the stall time, at a pace that empties no buffer within it
            assert await loop.sock_recv(sock, 3000)
            await asyncio.sleep(0.06)
        assert bench.cancelled == 0
        sock.close()

    run(test)


def test_a_reader_of_nothing_loses_its_answer(run: Clerk) -> None:
    async def test(bench: Bench) -> None:
        sock = small_window(bench)
        await asyncio.get_running_loop().sock_sendall(sock, post("/big", b""))
        while not bench.server.connections:
            await asyncio.sleep(0.01)
        while bench.server.connections:
            await asyncio.sleep(0.05)
        sock.close()

    run(_with(test, "/big", _big))


@pytest.mark.parametrize("path", ["/flood", "/wide"])
def test_who_says_no_more_and_reads_nothing_is_left_in_time(run: Clerk, path: str) -> None:
    async def wide(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.send(sse.event(b"x" * 8_000_000, exchange.chunked))
        await asyncio.sleep(3600)

    async def test(bench: Bench) -> None:
        sock = small_window(bench)
        await asyncio.get_running_loop().sock_sendall(sock, get(path))
        await asyncio.sleep(0.2)
        assert bench.server.n_busy == 1
        sock.shutdown(socket.SHUT_WR)
        while bench.server.connections:
            await asyncio.sleep(0.05)
        assert bench.server.n_busy == 0
        sock.close()

    run(_with(test, "/wide", wide, "GET"))


def test_who_says_no_more_may_read_on_slowly(run: Clerk) -> None:
    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        sock = small_window(bench, 16384)
        await loop.sock_sendall(sock, get("/flood"))
        await asyncio.sleep(0.2)
        sock.shutdown(socket.SHUT_WR)
        for _ in range(20):  # twice the stall time
            assert await loop.sock_recv(sock, 3000)
            await asyncio.sleep(0.06)
        sock.close()

    run(test)


# -- memory --------------------------------------------------------------------------------------------


async def _big(exchange: Exchange) -> None:
    exchange.respond(200, b"x" * 400_000)


def _with(
    test: Test, path: str, handler: Callable[[Exchange], Awaitable[None]], method: str = "POST"
) -> Test:
    """The test, with one route more."""

    async def wrapped(bench: Bench) -> None:
        bench.server.router.add(method, path, handler)
        await test(bench)

    return wrapped


def test_answers_wait_for_a_reader_before_the_next_is_made(run: Clerk) -> None:
    made = 0

    async def big(exchange: Exchange) -> None:
        nonlocal made
        made += 1
        exchange.respond(200, b"x" * 400_000)

    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        sock = small_window(bench)
        await loop.sock_sendall(sock, post("/big", b"") * 200)
        await asyncio.sleep(0.4)
        assert 0 < made < 30, f"{made} answers were made for a client that reads none"
        got = 0
        while got < 200 * 400_000:
            got += len(await loop.sock_recv(sock, 1 << 20))
        assert made == 200
        sock.close()

    limits = Limits(stall_s=10, idle_s=10)
    run(_with(test, "/big", big), limits)


def test_a_declared_length_over_the_limit_is_refused_without_a_reader(run: Clerk) -> None:
    async def test(bench: Bench) -> None:
        head = b"POST /refuses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100001\r\n\r\n"
        assert statuses(await talk(bench, head)) == [413]

    run(test)


# -- order ---------------------------------------------------------------------------------------------


def test_what_is_sent_after_the_end_is_in_no_later_answer(run: Clerk) -> None:
    async def late(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.end_stream()
        exchange.send(sse.comment("late", exchange.chunked))
        exchange.respond(200, b"again")
        exchange.end_stream()

    async def test(bench: Bench) -> None:
        got = await talk(bench, get("/late") + post("/echo", b"next", CLOSE))
        assert statuses(got) == [200, 200]
        assert b"late" not in got
        assert b"again" not in got
        assert got.endswith(b"next")

    run(_with(test, "/late", late, "GET"))


def test_an_answer_that_closes_is_not_lost_to_what_follows_it(run: Clerk) -> None:
    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        sock = small_window(bench, 1 << 16)
        await loop.sock_sendall(sock, post("/big", b"", CLOSE) + b"x" * 300_000)
        await asyncio.sleep(0.05)
        got = b""
        while piece := await loop.sock_recv(sock, 1 << 16):
            got += piece
        assert got.endswith(b"x" * 400_000)
        sock.close()

    run(_with(test, "/big", _big))


def test_an_upgrade_is_ignored(run: Clerk) -> None:
    async def test(bench: Bench) -> None:
        asks = post(
            "/echo", b"a", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AA"
        )
        assert statuses(await talk(bench, asks + post("/echo", b"b", CLOSE))) == [200, 200]

    run(test)


def test_one_empty_line_before_a_request_is_forgiven(run: Clerk) -> None:
    async def test(bench: Bench) -> None:
        assert statuses(await talk(bench, b"\r\n" + post("/echo", b"b", CLOSE))) == [200]
        assert statuses(await talk(bench, b"\r\n\r\n" + post("/echo", b"b", CLOSE))) == [400]

    run(test)


def test_a_body_broken_in_its_framing_is_refused_though_nobody_reads_it(run: Clerk) -> None:
    async def test(bench: Bench) -> None:
        broken = get("/stream", "Transfer-Encoding: chunked") + b"zz\r\n"
        got = await talk(bench, broken)
        assert statuses(got) == [400]
        assert error(got)["code"] == "bad_http"

    run(test)


def test_head_of_a_stream_has_no_events(run: Clerk) -> None:
    async def test(bench: Bench) -> None:
        head = b"HEAD /stream HTTP/1.1\r\nHost: localhost\r\n\r\n"
        got = await talk(bench, head + post("/echo", b"next", CLOSE))
        assert statuses(got) == [200, 200]
        assert b"data:" not in got

    run(test)


# -- the books and faults --------------------------------------------------------------------------------


def test_a_handler_that_answers_a_client_who_left_counts_once(run: Clerk) -> None:
    async def answers_late(exchange: Exchange) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            exchange.respond(200, b"to nobody")

    async def test(bench: Bench) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(get("/late"))
        await asyncio.sleep(0.1)
        writer.write_eof()
        await asyncio.sleep(0.2)
        assert await bench.server.wait_idle(0.1)
        writer.close()

    run(_with(test, "/late", answers_late, "GET"))


def test_a_handler_may_tidy_up_after_its_answer(run: Clerk) -> None:
    tidied = asyncio.Event()

    async def tidies(exchange: Exchange) -> None:
        exchange.respond(200, b"done")
        await asyncio.sleep(0.2)
        tidied.set()

    async def test(bench: Bench) -> None:
        assert statuses(await talk(bench, get("/tidy", CLOSE))) == [200]
        await asyncio.wait_for(tidied.wait(), 2)

    run(_with(test, "/tidy", tidies, "GET"))


def test_a_header_that_would_split_the_answer_is_a_fault(run: Clerk) -> None:
    async def splits(exchange: Exchange) -> None:
        exchange.respond(200, b"x", headers=[("x-evil", "a\r\nSet-Cookie: b=c")])

    async def test(bench: Bench) -> None:
        got = await talk(bench, get("/split", CLOSE))
        assert statuses(got) == [500]
        assert b"Set-Cookie" not in got

    run(_with(test, "/split", splits, "GET"))


def test_a_handler_that_cancels_itself_is_a_fault(run: Clerk) -> None:
    async def cancels(exchange: Exchange) -> None:
        raise asyncio.CancelledError

    async def test(bench: Bench) -> None:
        assert statuses(await talk(bench, get("/cancel", CLOSE))) == [500]
        assert await bench.server.wait_idle(0.1)

    run(_with(test, "/cancel", cancels, "GET"))


def test_a_refusal_of_a_small_body_keeps_the_connection(run: Clerk) -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, post("/nowhere", b"{}") + post("/echo", b"x", CLOSE))
        assert statuses(got) == [404, 200]

    run(test)


def test_a_stream_ends_with_what_went_wrong(run: Clerk) -> None:
    async def refuses_later(exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.send(sse.event(b"1", exchange.chunked))
        raise errors.Unavailable("gone")

    async def test(bench: Bench) -> None:
        got = await talk(bench, get("/later"))
        assert statuses(got) == [200]
        assert got.endswith(b"\n\n\r\n0\r\n\r\n")
        assert b'data: {"error":{"message":"gone"' in got
        assert b"[DONE]" not in got

    run(_with(test, "/later", refuses_later, "GET"))
