"""Request heads and chunked framing: ambiguous input is refused, in whatever pieces it arrives."""

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyoai import errors
from tinyoai.web.request_head import ChunkedFraming, Head, Limits, read_head

LIMITS = Limits()
GOOD = b"POST /v1/x?y=1 HTTP/1.1\r\nHost: localhost:8000\r\nContent-Length: 5\r\nX-A:  b c \r\n\r\n"


def head(data: bytes, limits: Limits = LIMITS) -> Head:
    """Parses a complete head and returns it."""
    found = read_head(data, limits)
    assert found is not None
    return found


def test_a_good_head() -> None:
    found = head(GOOD + b"rest")
    assert (found.method, found.target, found.minor, found.size) == ("POST", b"/v1/x?y=1", 1, len(GOOD))
    assert (found.content_length, found.chunked, found.expects_continue) == (5, False, False)
    assert found.get(b"x-a") == b"b c"
    assert found.get(b"none") is None


def with_(line: bytes, method: bytes = b"POST") -> bytes:
    """Returns a request with one more header line."""
    return method + b" / HTTP/1.1\r\nHost: a\r\n" + line + b"\r\n\r\n"


REFUSED: list[tuple[bytes, int]] = [
    # two servers could read these requests differently
    (with_(b"Content-Length: 5\r\nTransfer-Encoding: chunked"), 400),
    (with_(b"Transfer-Encoding: chunked\r\nContent-Length: 5"), 400),
    (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (with_(b"Transfer-Encoding: gzip, chunked"), 501),
    (with_(b"Transfer-Encoding: xchunked"), 501),
    (with_(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"), 400),
    (with_(b"Transfer-Encoding:\x0bchunked"), 400),
    (with_(b"Transfer-Encoding : chunked"), 400),
    (with_(b"Transfer-Encoding:\r\n chunked"), 400),
    (with_(b"Content-Length: 5\r\nContent-Length: 5"), 400),
    (with_(b"Content-Length: 5, 5"), 400),
    (with_(b"Content-Length: +5"), 400),
    (with_(b"Content-Length: -5"), 400),
    (with_(b"Content-Length: 0x5"), 400),
    (with_(b"Content-Length: 5_0"), 400),
    (with_(b"Content-Length: "), 400),
    (with_(b"Content-Length: 10000000000000000000"), 400),
    # lines
    (b"GET / HTTP/1.1\nHost: a\n\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", 400),
    (with_(b"X: a\r\n folded"), 400),
    (with_(b"X: a\x00b"), 400),
    (with_(b"X: a\x01b"), 400),
    (with_(b"X: a\x7fb"), 400),
    (with_(b": empty name"), 400),
    (with_(b"no colon"), 400),
    (with_(b"X y: z"), 400),
    # hosts
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: \r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a/b@c\r\n\r\n", 400),
    # request lines
    (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    (b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", 505),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    (b"GET /\r\n\r\n", 400),
    (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
    (b"GET v1 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    (b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    # sizes, also if everything arrives at once
    (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    (b"GET /" + b"a" * 9000, 414),
    (with_(b"X: " + b"a" * 20_000), 431),
    (with_(b"\r\n".join(b"X: a" for _ in range(101))), 431),
    (with_(b"Expect: 200-ok"), 417),
]


def verdict(data: bytes, step: int) -> int:
    """Returns the error's status, 0 for a head, -1 for neither, when the bytes arrive in steps."""
    for end in [*range(step, len(data), step), len(data)]:
        try:
            if read_head(data[:end], LIMITS) is not None:
                return 0
        except errors.ApiError as error:
            return error.status
    return -1


@pytest.mark.parametrize(("data", "status"), REFUSED)
def test_refused(data: bytes, status: int) -> None:
    assert verdict(data, len(data)) == status


@pytest.mark.parametrize(("data", "status"), [case for case in REFUSED if len(case[0]) < 500])
def test_refused_byte_by_byte(data: bytes, status: int) -> None:
    assert verdict(data, 1) == status


@pytest.mark.parametrize(
    "data",
    [
        GOOD,
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET http://a/v1 HTTP/1.1\r\nHost: A\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        with_(b"Transfer-Encoding: Chunked"),
        with_(b"Content-Length: 005"),
        with_(b"Expect: 100-Continue"),
        b"GET / HTTP/1.1\r\nHost: [::1]:80\r\nX: \xe9\r\n\r\n",
    ],
)
def test_accepted_whole_and_byte_by_byte(data: bytes) -> None:
    assert verdict(data, len(data)) == 0
    assert verdict(data, 1) == 0


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(max_size=3)), max_size=3))
def test_h11_reads_accepted_heads_the_same_way(edits: list[tuple[int, bytes]]) -> None:
    data = GOOD
    for at, new in edits:
        data = data[:at] + new + data[at + len(new) :]
    try:
        found = read_head(data, LIMITS)
    except errors.ApiError:
        return
    if found is None:
        return
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(data[: found.size])
    request = reader.next_event()
    assert isinstance(request, h11.Request)
    assert request.method.decode() == found.method
    assert [(bytes(k), bytes(v).strip(b" \t")) for k, v in request.headers] == found.fields


def chunks(data: bytes, step: int, limits: Limits = LIMITS) -> tuple[int, bool]:
    """Returns the number of body bytes and whether the body ended, or the error's status."""
    framing, used = ChunkedFraming(limits), 0
    try:
        for at in range(0, len(data), step):
            used += framing.feed(data[at : at + step])
    except errors.ApiError as error:
        return error.status, False
    return used, framing.done


WIRE = b"5\r\nhello\r\n0a;x=y\r\n0123456789\r\n0\r\nX-Trailer: a\r\n\r\n"


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_the_end_of_a_chunked_body(step: int) -> None:
    assert chunks(WIRE, step) == (len(WIRE), True)
    assert chunks(WIRE + b"GET / HTTP/1.1", step) == (len(WIRE), True)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"5\nhello\n0\n\n", 400),
        (b"5\r\nhelloX\r\n", 400),
        (b"5\r\nhello\n0\r\n\r\n", 400),
        (b"+5\r\nhello\r\n", 400),
        (b"0x5\r\nhello\r\n", 400),
        (b"5_0\r\n", 400),
        (b"\r\n", 400),
        (b"fffffffff\r\n", 400),
        (b"5;\x00\r\nhello\r\n", 400),
        (b"5;" + b"a" * 400 + b"\r\n", 400),
        (b"0\r\nno colon\r\n\r\n", 400),
        (b"0\r\n" + b"X: a\r\n" * 1 + b"Y: " + b"a" * 5000, 400),
        (b"1\r\na\r\n" * 10_001, 413),
    ],
)
def test_refused_chunks(data: bytes, status: int) -> None:
    assert chunks(data, len(data)) == (status, False)


def test_a_body_with_too_much_framing_is_refused() -> None:
    small = Limits(body_bytes=1000)
    assert chunks((b"1;" + b"x" * 200 + b"\r\na\r\n") * 600, 4096, small) == (413, False)
