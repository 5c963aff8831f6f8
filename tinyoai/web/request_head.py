"""Reads a request's head, and the framing of a chunked body, strictly and before h11 does.

h11 is lenient where requests can be smuggled: a length beside a transfer coding, folded headers, bare
line feeds, odd versions, heads of any size that arrive at once. This module refuses all of that. It is
pure: it turns bytes into a Head or an ApiError.
"""

import re

import msgspec

from tinyoai import errors

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e]+) HTTP/(\d)\.(\d)")
_FIELD = re.compile(rb"(" + TOKEN + rb"):[ \t]*([\x20-\x7e\t\x80-\xff]*?)[ \t]*")
_HOST = re.compile(rb"(?:[A-Za-z0-9._\-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[\x20-\x7e\t]{0,256})?")

MAX_CHUNK_LINE = 300


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one connection: bytes, counts and seconds."""

    head_bytes: int = 16 << 10
    target_bytes: int = 8 << 10
    fields: int = 100
    body_bytes: int = 4 << 20
    chunks: int = 10_000
    trailer_bytes: int = 4 << 10
    head_s: float = 10.0
    """From the accept, or from a request's first byte, to the end of its head."""
    body_s: float = 30.0
    idle_s: float = 100.0
    """Between two requests. Clients and proxies keep idle connections for up to 90 s and must close first."""
    stall_s: float = 30.0
    """For a client that takes no byte of a response."""
    linger_s: float = 1.0
    """For reading on after the last response of a connection, so that the client receives it."""
    connections: int = 256


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """A request's head."""

    method: str
    target: bytes
    minor: int
    """0 for HTTP/1.0, 1 for HTTP/1.1."""
    fields: list[tuple[bytes, bytes]]
    """Names in lower case."""
    size: int
    """Bytes of the head, including its empty line."""
    content_length: int
    chunked: bool
    expects_continue: bool

    def get(self, name: bytes) -> bytes | None:
        """Returns a field's value. Several fields of this name are joined by commas."""
        values = [value for key, value in self.fields if key == name]
        return b", ".join(values) if values else None


NO_HEAD = Head(
    method="",
    target=b"",
    minor=1,
    fields=[],
    size=0,
    content_length=0,
    chunked=False,
    expects_continue=False,
)
"""The placeholder for the head of input that is not a request."""


def read_head(buffer: bytes | bytearray, limits: Limits) -> Head | None:
    """Returns the head at the start of the buffer, or None while it is incomplete. Raises errors.ApiError."""
    if buffer.find(b"\n") < 0:
        _check_incomplete_line(bytes(buffer), limits)
        return None
    end = buffer.find(b"\r\n\r\n")
    size = end + 4 if end >= 0 else len(buffer)
    head = bytes(buffer[:size])
    lines = head.split(b"\r\n")
    _check_request_line_size(lines[0], limits)
    if size > limits.head_bytes:
        raise errors.HeadersTooLarge(f"the headers are over {limits.head_bytes} bytes")
    if head.count(b"\n") > limits.fields + 2:
        raise errors.HeadersTooLarge(f"the request has more than {limits.fields} headers")
    if any(b"\n" in line or (b"\r" in line[:-1] if end < 0 else b"\r" in line) for line in lines):
        raise errors.BadRequest("a line of the head does not end in CR LF", code="bad_http")
    method, target, minor = _parse_request_line(lines[0])
    if end < 0:
        return None
    fields = [_parse_field(line) for line in lines[1:-2]]
    return _build_head(method, target, minor, fields, size)


def _check_incomplete_line(buffer: bytes, limits: Limits) -> None:
    """Refuses bytes that cannot begin a request line."""
    _check_request_line_size(buffer, limits)
    if buffer and not re.match(rb"[!-~]", buffer[:1]):
        raise errors.BadRequest(
            "not an HTTP request; this server does not speak HTTPS, use http://", code="bad_http"
        )


def _check_request_line_size(line: bytes, limits: Limits) -> None:
    if len(line) > limits.target_bytes + 64:
        raise errors.UriTooLong(f"the request target is over {limits.target_bytes} bytes")


def _parse_request_line(line: bytes) -> tuple[str, bytes, int]:
    found = _REQUEST_LINE.fullmatch(line)
    if not found:
        raise errors.BadRequest("the first line is not an HTTP/1.1 request line", code="bad_http")
    method, target, major, minor = found.groups()
    if (major, minor) not in ((b"1", b"0"), (b"1", b"1")):
        raise errors.VersionNotSupported("only HTTP/1.0 and HTTP/1.1 are supported")
    return method.decode(), target, int(minor)


def _parse_field(line: bytes) -> tuple[bytes, bytes]:
    found = _FIELD.fullmatch(line)
    if not found:
        raise errors.BadRequest(
            "a header is malformed, folded, or contains control characters", code="bad_http"
        )
    return found[1].lower(), found[2]


def _build_head(method: str, target: bytes, minor: int, fields: list[tuple[bytes, bytes]], size: int) -> Head:
    def only(name: bytes) -> bytes | None:
        values = [value for key, value in fields if key == name]
        if len(values) > 1:
            raise errors.BadRequest(f"the header {name.decode()} appears more than once", code="bad_http")
        return values[0] if values else None

    host = only(b"host")
    if host is None and minor == 1:
        raise errors.BadRequest("HTTP/1.1 requires a Host header", code="bad_http")
    if host is not None and not _HOST.fullmatch(host):
        raise errors.BadRequest("the Host header is not a host name", code="bad_http")
    if method in ("CONNECT", "TRACE"):
        raise errors.MethodNotAllowed(
            f"method {method} is not allowed", headers={"allow": "GET, HEAD, POST, OPTIONS"}
        )
    target = _origin_form(method, target, host)
    length, coding = only(b"content-length"), only(b"transfer-encoding")
    if coding is not None:
        if length is not None or minor == 0:
            raise errors.BadRequest(
                "Transfer-Encoding with a Content-Length or in HTTP/1.0 is ambiguous", code="bad_http"
            )
        if coding.lower() != b"chunked":
            raise errors.NotImplementedCoding("the only supported transfer coding is chunked")
    if length is not None and not _LENGTH.fullmatch(length):
        raise errors.BadRequest("the Content-Length is not a plain number", code="bad_http")
    expect = only(b"expect")
    if expect is not None and expect.lower() != b"100-continue":
        raise errors.ExpectationFailed("the only supported expectation is 100-continue")
    return Head(
        method=method,
        target=target,
        minor=minor,
        fields=fields,
        size=size,
        content_length=int(length or 0),
        chunked=coding is not None,
        expects_continue=expect is not None and minor == 1,
    )


def _origin_form(method: str, target: bytes, host: bytes | None) -> bytes:
    """Returns the target as a path. An absolute form must name the same host as the Host header."""
    if target.startswith(b"/") or (target == b"*" and method == "OPTIONS"):
        return target
    absolute = re.fullmatch(rb"(?i:http)://([^/?#]+)(/[^#]*)?", target)
    if not absolute:
        raise errors.BadRequest("the request target is not a path", code="bad_http")
    if absolute[1].lower() != (host or b"").lower():
        raise errors.BadRequest(
            "the request target and the Host header name different hosts", code="bad_http"
        )
    return absolute[2] or b"/"


class ChunkedFraming:
    """Finds the end of a chunked body in its wire bytes, and checks that its framing is strict."""

    __slots__ = ("_left", "_limits", "_line", "_n_chunks", "_n_wire", "_state", "done")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._state = "size"
        """size → data → end → size, and after a size of 0: trailer."""
        self._line = bytearray()
        self._left = 0
        self._n_chunks = 0
        self._n_wire = 0
        self.done = False

    def feed(self, data: bytes | bytearray) -> int:
        """Returns how many of these bytes belong to the body. Raises errors.ApiError."""
        at = 0
        while at < len(data) and not self.done:
            if self._state == "data":
                step = min(self._left, len(data) - at)
                self._left -= step
                at += step
                if self._left == 0:
                    self._state = "end"
                continue
            newline = data.find(b"\n", at)
            stop = newline + 1 if newline >= 0 else len(data)
            self._line += data[at:stop]
            at = stop
            allowed = self._limits.trailer_bytes if self._state == "trailer" else MAX_CHUNK_LINE
            if len(self._line) > allowed:
                raise errors.BadRequest("a line of the chunked body is too long", code="bad_http")
            if newline >= 0:
                self._on_line(bytes(self._line))
                self._line.clear()
        self._n_wire += at
        if self._n_wire > 2 * self._limits.body_bytes + (64 << 10):
            raise errors.PayloadTooLarge(f"the body is over {self._limits.body_bytes} bytes")
        return at

    def _on_line(self, line: bytes) -> None:
        if not line.endswith(b"\r\n") or b"\r" in line[:-2]:
            raise errors.BadRequest("a line of the chunked body does not end in CR LF", code="bad_http")
        line = line[:-2]
        if self._state == "size":
            found = _CHUNK_SIZE.fullmatch(line)
            if not found:
                raise errors.BadRequest("a chunk size is malformed", code="bad_http")
            self._left = int(found[1], 16)
            self._n_chunks += 1
            if self._n_chunks > self._limits.chunks:
                raise errors.PayloadTooLarge(f"the body has more than {self._limits.chunks} chunks")
            self._state = "data" if self._left else "trailer"
        elif self._state == "end":
            if line:
                raise errors.BadRequest("a chunk is longer than its size", code="bad_http")
            self._state = "size"
        elif line:
            _parse_field(line)
        else:
            self.done = True
