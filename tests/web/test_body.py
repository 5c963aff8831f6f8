"""Request bodies: framing, limits, 100-continue."""

import asyncio

import pytest

from tests.web.harness import CLOSE, Bench, Runner, error, get, post, statuses, talk
from tinyoai.web.exchange import Exchange

CHUNKED = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"


def test_chunked_bodies(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        head = CHUNKED + b"Connection: close\r\n\r\n"
        got = await talk(bench, head, b"5\r\nhello\r\n", b"6\r\n world\r\n0\r\n\r\n", pause=0.01)
        assert statuses(got) == [200]
        assert got.endswith(b"hello world")

    run(test)


def test_a_body_over_the_limit_is_refused_while_it_arrives(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        assert statuses(await talk(bench, post("/echo", b"x" * 200_000))) == [413]
        head = CHUNKED + b"\r\n"
        chunk = b"%x\r\n%b\r\n" % (30_000, b"x" * 30_000)
        assert statuses(await talk(bench, head, *[chunk] * 6)) == [413]
        assert statuses(await talk(bench, head, *[b"1\r\nx\r\n" * 1000] * 11)) == [413]
        assert statuses(await talk(bench, head, b"5\nhello\n0\n\n")) == [400]

    run(test)


def test_a_declared_length_over_the_limit_is_refused_without_a_reader(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        head = b"POST /refuses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100001\r\n\r\n"
        assert statuses(await talk(bench, head)) == [413]

    run(test)


def test_broken_framing_is_an_error_even_if_no_handler_reads_the_body(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        broken = get("/stream", "Transfer-Encoding: chunked") + b"zz\r\n"
        got = await talk(bench, broken)
        assert statuses(got) == [400]
        assert error(got)["code"] == "bad_http"

    run(test)


def test_a_body_is_kept_for_a_handler_that_reads_late(run: Runner) -> None:
    async def reads_late(exchange: Exchange) -> None:
        await asyncio.sleep(20)
        exchange.respond(200, await exchange.read_body())

    async def test(bench: Bench) -> None:
        got = await talk(bench, post("/late", b"early") + post("/late", b"next", CLOSE))
        assert statuses(got) == [200, 200]
        assert got.index(b"early") < got.index(b"next")

    run(test, routes={("POST", "/late"): reads_late})


@pytest.mark.rule(26)
def test_100_continue_is_sent_when_the_body_is_read(run: Runner) -> None:
    async def test(bench: Bench) -> None:
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(head % (b"/echo", 2))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        writer.write(b"ok")
        assert (await reader.read()).endswith(b"ok")
        writer.close()
        # an error comes at once, without a 100
        for path, length, status in ((b"/nowhere", 2, 404), (b"/refuses", 2, 429), (b"/echo", 10**7, 413)):
            assert statuses(await talk(bench, head % (path, length))) == [status]

    run(test)
