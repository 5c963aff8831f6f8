"""Responses: heads, streams, HEAD, HTTP/1.0, and handlers that continue after the end."""

import asyncio

from tests.web.harness import CLOSE, Bench, Runner, get, now, post, settle, statuses, talk
from tinyoai import errors
from tinyoai.web import sse
from tinyoai.web.exchange import Exchange


def test_an_echo_and_its_headers(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, post("/echo", b"hello", CLOSE, "X-Request-ID: mine"))
        head, _, body = got.partition(b"\r\n\r\n")
        assert statuses(got) == [200]
        assert body == b"hello"
        for line in (
            b"content-length: 5",
            b"x-request-id: mine",
            b"x-elapsed-ms: 0.000",
            b"connection: close",
        ):
            assert line in head.lower()

    run(test)


def test_a_request_id_that_is_long_or_odd_is_replaced(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        for given in ("", "a b", "x" * 129, "\xe9"):
            got = await talk(bench, get("/stream", CLOSE, f"X-Request-ID: {given}"))
            assert b"x-request-id: req_" in got

    run(test)


def test_time_runs_from_the_end_of_the_head(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        begun = now()
        request = get("/slow", CLOSE)
        got = await talk(bench, request[:10], request[10:], pause=3.0)
        assert b"x-elapsed-ms: 5000." in got
        (exchange,) = bench.done
        assert 3.0 <= exchange.started - begun < 3.1

    run(test)


def test_http_1_0(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, b"GET /stream HTTP/1.0\r\n\r\n")
        assert b"chunked" not in got.lower()
        assert got.endswith(b"data: 0\n\ndata: 1\n\ndata: 2\n\n")

    run(test)


def test_a_stream_keeps_the_connection(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, get("/stream") + get("/stream", CLOSE))
        assert statuses(got) == [200, 200]
        assert got.count(b"\r\n0\r\n\r\n") == 2

    run(test)


def test_a_failed_stream_ends_with_an_error_event(run: Runner) -> None:
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

    run(test, routes={("GET", "/later"): refuses_later})


def test_head_has_the_length_and_no_body(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, b"HEAD /slow HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert statuses(got) == [200]
        assert b"content-length: 4" in got
        assert got.endswith(b"\r\n\r\n")

    run(test)


def test_head_of_a_stream_has_no_events(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        head = b"HEAD /stream HTTP/1.1\r\nHost: localhost\r\n\r\n"
        got = await talk(bench, head + post("/echo", b"next", CLOSE))
        assert statuses(got) == [200, 200]
        assert b"data:" not in got

    run(test)


def test_bytes_sent_after_the_end_are_in_no_later_response(run: Runner) -> None:
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

    run(test, routes={("GET", "/late"): late})


def test_a_handler_may_clean_up_after_its_response(run: Runner) -> None:
    tidied = 0

    async def tidies(exchange: Exchange) -> None:
        nonlocal tidied
        exchange.respond(200, b"done")
        await asyncio.sleep(0.2)
        tidied += 1

    async def test(bench: Bench) -> None:
        assert statuses(await talk(bench, get("/tidy", CLOSE))) == [200]
        await asyncio.sleep(1)
        assert tidied == 1

    run(test, routes={("GET", "/tidy"): tidies})


def test_a_header_with_a_line_break_is_a_fault(run: Runner) -> None:
    async def splits(exchange: Exchange) -> None:
        exchange.respond(200, b"x", headers=[("x-evil", "a\r\nSet-Cookie: b=c")])

    async def test(bench: Bench) -> None:
        got = await talk(bench, get("/split", CLOSE))
        assert statuses(got) == [500]
        assert b"Set-Cookie" not in got

    run(test, routes={("GET", "/split"): splits})


def test_last_sent_is_the_time_of_the_last_event(run: Runner) -> None:
    seen: list[float] = []

    async def sends(exchange: Exchange) -> None:
        exchange.start_stream()
        for _ in range(2):
            await asyncio.sleep(7)
            exchange.send(sse.event(b"x", exchange.chunked))
            seen.append(exchange.last_sent - exchange.started)
        exchange.end_stream()

    async def test(bench: Bench) -> None:
        await talk(bench, get("/sends", CLOSE))
        await settle()
        assert [round(s, 3) for s in seen] == [7.0, 14.0]

    run(test, routes={("GET", "/sends"): sends})
