"""Clients that read slowly or not at all: streams wait, memory is bounded, and stalled streams end."""

import asyncio
import socket

import pytest

from tests.web.harness import (
    CLOSE,
    LIMITS,
    Bench,
    Runner,
    get,
    narrow_client,
    now,
    post,
    settle,
    tcp_client,
)
from tinyoai.web import sse
from tinyoai.web.exchange import Exchange
from tinyoai.web.request_head import Limits


async def wide(exchange: Exchange) -> None:
    """Sends one huge event and waits."""
    exchange.start_stream()
    exchange.send(sse.event(b"x" * 8_000_000, exchange.chunked))
    await asyncio.Event().wait()


def test_a_stream_waits_for_a_slow_reader_and_then_ends(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        sock = await narrow_client(bench)
        begun = now()
        await asyncio.get_running_loop().sock_sendall(sock, get("/flood"))
        await settle()
        sent = bench.sent
        await asyncio.sleep(LIMITS.stall_s - 1)
        assert bench.cancelled == 0
        assert bench.sent == sent, "the stream must wait for its reader"
        while not bench.cancelled:
            await asyncio.sleep(0.1)
        assert now() - begun == pytest.approx(LIMITS.stall_s, abs=0.5)
        sock.close()

    run(test)


def test_a_slow_reader_keeps_its_stream(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        sock = await narrow_client(bench)
        await loop.sock_sendall(sock, get("/flood"))
        await settle()
        for _ in range(40):  # four times the stall time, at a pace that never empties a buffer in time
            assert await loop.sock_recv(sock, 3000)
            await asyncio.sleep(LIMITS.stall_s / 10)
        assert bench.cancelled == 0
        assert bench.server.n_busy == 1
        sock.close()

    run(test)


def test_a_client_that_reads_nothing_is_dropped(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        sock = tcp_client(bench)
        begun = now()
        await asyncio.get_running_loop().sock_sendall(sock, post("/big", b"", CLOSE))
        await settle()
        assert len(bench.server.connections) == 1
        while bench.server.connections:
            await asyncio.sleep(1)
        assert now() - begun > LIMITS.stall_s / 2
        sock.close()

    run(test)


@pytest.mark.parametrize("path", ["/flood", "/wide"])
def test_a_client_that_half_closes_and_reads_nothing_is_dropped(run: Runner, path: str) -> None:
    async def test(bench: Bench) -> None:
        sock = tcp_client(bench)
        await asyncio.get_running_loop().sock_sendall(sock, get(path))
        await settle()
        assert bench.server.n_busy == 1
        sock.shutdown(socket.SHUT_WR)
        while bench.server.connections:
            await asyncio.sleep(1)
        assert bench.server.n_busy == 0
        sock.close()

    run(test, routes={("GET", "/wide"): wide})


def test_a_client_that_half_closes_may_read_on_slowly(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        sock = await narrow_client(bench)
        await loop.sock_sendall(sock, get("/wide"))
        await settle()
        sock.shutdown(socket.SHUT_WR)
        for _ in range(20):  # twice the stall time
            assert await loop.sock_recv(sock, 3000)
            await asyncio.sleep(LIMITS.stall_s / 10)
        sock.close()

    run(test, routes={("GET", "/wide"): wide})


def test_pipelined_responses_wait_for_the_reader(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        sock = tcp_client(bench)
        await loop.sock_sendall(sock, post("/big", b"") * 100)
        await settle()
        assert 0 < len(bench.done) < 30, f"{len(bench.done)} responses were made for a client that reads none"
        got = 0
        while got < 100 * 400_000:
            got += len(await loop.sock_recv(sock, 1 << 20))
        assert len(bench.done) == 100
        sock.close()

    # no time limits: the kernel may move the bytes only after the virtual clock has advanced
    run(test, Limits(stall_s=3600, idle_s=3600))


def test_bytes_after_the_last_request_do_not_lose_its_response(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        sock = tcp_client(bench, 1 << 16)
        await loop.sock_sendall(sock, post("/big", b"", CLOSE) + b"x" * 300_000)
        await settle()
        got = b""
        while piece := await loop.sock_recv(sock, 1 << 16):
            got += piece
        assert got.endswith(b"x" * 400_000)
        sock.close()

    run(test)
