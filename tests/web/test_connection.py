"""Connections over real sockets: order, pipelining, time limits, clients that disconnect, faults."""

import asyncio
import socket

import pytest

from tests.web.harness import CLOSE, LIMITS, Bench, Runner, error, get, now, post, settle, statuses, talk
from tinyoai.web import connection
from tinyoai.web.exchange import Exchange
from tinyoai.web.request_head import Limits


@pytest.mark.parametrize("cut", [1, 2, 7, 50])
def test_a_request_may_arrive_in_any_pieces(run: Runner, cut: int) -> None:
    async def test(bench: Bench) -> None:
        data = post("/echo", b"hello world", CLOSE)
        got = await talk(bench, *[data[i : i + cut] for i in range(0, len(data), cut)], pause=0.001)
        assert statuses(got) == [200]
        assert got.endswith(b"hello world")

    run(test)


def test_pipelined_requests_are_answered_in_order_and_not_read_ahead(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        data = post("/echo", b"one") + get("/slow") + get("/stream") + post("/echo", b"four", CLOSE)
        got = await talk(bench, data)
        assert statuses(got) == [200, 200, 200, 200]
        assert got.index(b"one") < got.index(b"slow") < got.index(b"data: 0") < got.index(b"four")

    run(test)


def test_a_thousand_pipelined_requests(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, post("/echo", b"x") * 1000 + post("/echo", b"x", CLOSE))
        assert statuses(got) == [200] * 1001

    run(test)


def test_a_request_in_the_body_of_another_is_not_answered(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        smuggled = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        got = await talk(bench, smuggled + get("/stream"))
        assert statuses(got) == [400]

    run(test)


def test_an_upgrade_is_ignored(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        wish = post(
            "/echo", b"a", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AA"
        )
        assert statuses(await talk(bench, wish + post("/echo", b"b", CLOSE))) == [200, 200]

    run(test)


def test_one_empty_line_before_a_request_is_accepted(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        assert statuses(await talk(bench, b"\r\n" + post("/echo", b"b", CLOSE))) == [200]
        assert statuses(await talk(bench, b"\r\n\r\n" + post("/echo", b"b", CLOSE))) == [400]

    run(test)


# -- time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "limit"),
    [
        ([b"GET / HT"] + [b"T"] * 60, LIMITS.head_s),
        ([b"GET /stream HTTP/1.1\r\nHost: localhost\r\n"] + [b"X: y\r\n"] * 60, LIMITS.head_s),
        (
            [b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n"] + [b"x"] * 60,
            LIMITS.body_s,
        ),
        (
            [b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"]
            + [b"1\r\nx\r\n"] * 60,
            LIMITS.body_s,
        ),
    ],
)
def test_a_client_that_dribbles_is_cut_off(run: Runner, parts: list[bytes], limit: float) -> None:
    async def test(bench: Bench) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        begun = now()

        async def dribble() -> None:
            for part in parts:
                writer.write(part)
                await asyncio.sleep(1.0)

        task = asyncio.ensure_future(dribble())
        got = await reader.read()
        assert limit <= now() - begun <= limit + 1
        assert not task.done(), "the server must not wait for the whole request"
        task.cancel()
        writer.close()
        assert statuses(got) == [408]
        assert error(got)["type"] == "timeout_error"

    run(test)


def test_empty_lines_keep_no_connection_open(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        begun = now()

        async def dribble() -> None:
            for _ in range(60):
                writer.write(b"\r\n")
                await asyncio.sleep(1.0)

        task = asyncio.ensure_future(dribble())
        await reader.read()
        assert now() - begun <= LIMITS.head_s + 1
        assert not task.done(), "the server must not wait for all lines"
        task.cancel()
        writer.close()

    run(test)


def test_a_client_that_says_nothing_is_closed(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        begun = now()
        assert await talk(bench) == b""
        assert now() - begun == pytest.approx(LIMITS.head_s, abs=0.5)
        begun = now()
        assert statuses(await talk(bench, post("/echo", b"x"))) == [200]
        assert now() - begun == pytest.approx(LIMITS.idle_s, abs=0.5)

    run(test)


def test_the_idle_limit_is_longer_than_that_of_clients(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, post("/echo", b"x"), post("/echo", b"y", CLOSE), pause=90.0)
        assert statuses(got) == [200, 200]

    run(test, Limits())


def test_a_partial_pipelined_request_has_the_time_limit_of_a_head(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        begun = now()
        assert statuses(await talk(bench, post("/echo", b"x") + b"GET / HT")) == [200, 408]
        assert now() - begun == pytest.approx(LIMITS.head_s, abs=0.5)

    run(test)


def test_the_time_of_the_first_head_runs_from_the_accept(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        begun = now()
        await asyncio.sleep(4)
        writer.write(b"GET ")
        assert statuses(await reader.read()) == [408]
        assert now() - begun == pytest.approx(5, abs=0.5)
        writer.close()

    run(test, Limits(head_s=5))


def test_a_handler_may_take_longer_than_any_limit_of_its_client(run: Runner) -> None:
    async def takes_long(exchange: Exchange) -> None:
        await asyncio.sleep(1800)
        exchange.respond(200, b"at last")

    async def test(bench: Bench) -> None:
        assert (await talk(bench, get("/long", CLOSE))).endswith(b"at last")

    run(test, routes={("GET", "/long"): takes_long})


# -- clients that disconnect -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/wait", "/flood"])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_a_disconnect_cancels_the_handler_at_once(run: Runner, path: str, how: str) -> None:
    async def test(bench: Bench) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(get(path))
        await settle()
        leave(writer, how)
        await settle()
        assert bench.cancelled == 1
        assert bench.server.n_busy == 0
        assert [exchange.finished for exchange in bench.done] == [True]
        writer.close()

    run(test)


@pytest.mark.parametrize("path", ["/wait", "/flood"])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_a_disconnect_is_noticed_while_reading_is_paused(run: Runner, path: str, how: str) -> None:
    async def test(bench: Bench) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(get(path) + post("/echo", b"x" * 1000) * 200)
        await settle()
        await asyncio.sleep(10 * connection.HANGUP_CHECK_S)
        assert bench.server.n_busy == 1, "the client is still connected"
        leave(writer, how)
        await asyncio.sleep(2 * connection.HANGUP_CHECK_S)
        assert bench.cancelled == 1
        assert bench.server.n_busy == 0
        assert len(bench.done) == 1, "the server must not answer the other requests"
        writer.close()

    run(test)


def test_a_response_after_an_unnoticed_disconnect_is_not_logged(
    run: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    async def answers_soon(exchange: Exchange) -> None:
        await asyncio.sleep(connection.HANGUP_CHECK_S / 2)
        exchange.respond(200, b"too late")

    async def test(bench: Bench) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(get("/soon", CLOSE) + b"x" * 200_000)
        await settle()
        leave(writer, "close")  # the response makes the client's kernel reset the connection
        await asyncio.sleep(connection.HANGUP_CHECK_S)
        assert not bench.server.connections

    run(test, routes={("GET", "/soon"): answers_soon})
    assert not caplog.records


def leave(writer: asyncio.StreamWriter, how: str) -> None:
    """Disconnects a client."""
    if how == "reset":
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    if how == "half-close":
        writer.write_eof()
    else:
        writer.transport.abort()


def test_a_response_after_a_disconnect_is_counted_once(run: Runner) -> None:
    async def answers_late(exchange: Exchange) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            exchange.respond(200, b"to nobody")

    async def test(bench: Bench) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(get("/late"))
        await settle()
        writer.write_eof()
        await settle()
        assert bench.server.n_busy == 0
        assert len(bench.done) == 1
        writer.close()

    run(test, routes={("GET", "/late"): answers_late})


# -- faults --------------------------------------------------------------------------------------------


def test_a_fault_is_logged_and_not_sent(run: Runner, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_handler_that_cancels_itself_is_a_fault(run: Runner) -> None:
    async def cancels(exchange: Exchange) -> None:
        raise asyncio.CancelledError

    async def test(bench: Bench) -> None:
        assert statuses(await talk(bench, get("/cancel", CLOSE))) == [500]
        assert bench.server.n_busy == 0

    run(test, routes={("GET", "/cancel"): cancels})


def test_an_error_keeps_its_headers_and_if_possible_the_connection(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, post("/refuses", b"") + post("/refuses", b"", CLOSE))
        assert statuses(got) == [429, 429]
        assert got.count(b"retry-after: 7") == 2

    run(test)


def test_an_error_after_a_small_body_keeps_the_connection(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        got = await talk(bench, post("/nowhere", b"{}") + post("/echo", b"x", CLOSE))
        assert statuses(got) == [404, 200]

    run(test)
