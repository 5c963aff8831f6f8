"""The server: dispatch, counts, the limit of connections, and shutdown."""

import asyncio

import pytest

from tests.web.harness import CLOSE, Bench, Runner, get, post, settle, statuses, talk
from tinyoai.web.exchange import Exchange


async def answer(exchange: Exchange) -> None:
    """Responds with "ok"."""
    exchange.respond(200, b"ok")


def test_options_lists_methods(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, b"OPTIONS /echo HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert statuses(got) == [204]
        assert b"allow: OPTIONS, POST" in got or b"allow: POST, OPTIONS" in got
        got = await talk(bench, b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert statuses(got) == [204]

    run(test)


def test_too_many_connections_are_refused(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        opened = [await asyncio.open_connection("127.0.0.1", bench.port) for _ in range(20)]
        got = await talk(bench)
        assert statuses(got) == [503]
        assert b"retry-after" in got
        for _, writer in opened:
            writer.close()
        await settle()
        assert statuses(await talk(bench, post("/echo", b"x", CLOSE))) == [200]

    run(test)


def test_every_exchange_is_reported_once(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        await talk(bench, post("/echo", b"x") + post("/nowhere", b"") + b"GET / HTTP/9.9\r\n\r\n")
        assert [(e.method, e.route, e.status) for e in bench.done] == [
            ("POST", "/echo", 200),
            ("POST", "", 404),
            ("", "", 505),
        ]
        assert all(exchange.finished for exchange in bench.done)
        assert bench.server.n_busy == 0

    run(test)


# -- pages of this machine ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "asked", "allowed"),
    [
        ("OPTIONS", "/open", "GET", "GET"),
        ("OPTIONS", "/v1/open", "HEAD", "HEAD"),
        ("OPTIONS", "/open", "POST", ""),
        ("OPTIONS", "/open", "DELETE", ""),
        ("OPTIONS", "/open", "", ""),  # without Access-Control-Request-Method there is no method to allow
        ("OPTIONS", "/closed", "GET", ""),
        ("OPTIONS", "/nowhere", "GET", ""),
        ("OPTIONS", "*", "GET", ""),
        ("GET", "/open", "", "origin"),
        ("HEAD", "/open", "", "origin"),
        ("GET", "/closed", "", ""),
        ("POST", "/open", "", ""),
    ],
)
def test_local_pages_use_routes_with_the_flag(
    run: Runner, method: str, path: str, asked: str, allowed: str
) -> None:
    """`allowed` is the method that a preflight allows, or "origin" if the page may read the response."""

    async def test(bench: Bench) -> None:
        bench.router.add("GET", "/open", answer, local_pages=True)
        bench.router.add("POST", "/open", answer)
        bench.router.add("GET", "/closed", answer)
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Origin: http://localhost:3000", CLOSE]
        if asked:
            lines.append(f"Access-Control-Request-Method: {asked}")
        got = (await talk(bench, "\r\n".join([*lines, "", ""]).encode())).decode()
        assert ("access-control-allow-origin: http://localhost:3000" in got) == bool(allowed)
        assert ("access-control-allow-methods" in got) == (bool(asked) and bool(allowed))
        if asked and allowed:
            assert f"access-control-allow-methods: {allowed}\r\n" in got
        if method == "POST":
            assert statuses(got.encode()) == [403]

    run(test)


# -- shutdown -----------------------------------------------------------------------------------------


def test_draining_lets_answers_finish_and_accepts_no_more(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        idle = await asyncio.open_connection("127.0.0.1", bench.port)
        answers = asyncio.ensure_future(talk(bench, get("/slow") + get("/stream")))
        await settle()
        bench.server.begin_drain()
        assert await idle[0].read() == b""
        assert not await bench.server.wait_idle(4)
        assert await bench.server.wait_idle(2)
        got = await answers
        assert statuses(got) == [200]
        assert b"connection: close" in got
        idle[1].close()

    run(test)


def test_aborting_sends_errors_to_waiting_clients(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        waiting = asyncio.ensure_future(talk(bench, get("/wait")))
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(get("/flood"))
        await reader.readuntil(b"data: ")
        await settle()
        assert not await bench.server.wait_idle(5)
        bench.server.abort()
        got = await waiting
        assert statuses(got) == [503]
        assert b"connection: close" in got
        assert b'data: {"error"' in await reader.read()
        writer.close()
        assert bench.cancelled == 2

    run(test)
