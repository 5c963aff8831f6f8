"""The strict gate: reads a request's head, and a chunked body's framing, before h11 does.

h11 is lenient where requests can be smuggled: a length beside a transfer coding, folded headers, bare
line feeds, odd versions, heads of any size that arrive at once. All of that is refused here. Pure:
bytes in, a Head or an ApiError out. It must not know sockets, routes or handlers.
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
    """Bounds on what one connection may take: bytes, counts and seconds."""

    head_bytes: int = 16 << 10
    target_bytes: int = 8 << 10
    fields: int = 100
    body_bytes: int = 4 << 20
    chunks: int = 10_000
    trailer_bytes: int = 4 << 10
    head_s: float = 10.0
    """From the accept, or a request's first byte, to the end of its head."""
    body_s: float = 30.0
    idle_s: float = 30.0
    """Between two requests."""
    stall_s: float = 30.0
    """Without progress in reading an answer."""
    linger_s: float = 1.0
    """Reading on after a refusal, so that the client sees it."""
    connections: int = 256


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """A request's head, as the gate read it."""

    method: str
    target: bytes
    minor: int
    """HTTP/1.0 or HTTP/1.1."""
    fields: list[tuple[bytes, bytes]]
    """Names in lower case."""
    size: int
    """Bytes of the head, its empty line included."""
    content_length: int
    chunked: bool
    expects_continue: bool

    def get(self, name: bytes) -> bytes | None:
        """A field's value; several of the same name are joined by commas."""
        values = [value for key, value in self.fields if key == name]
        return b", ".join(values) if values else None


def read_head(buffer: bytes | bytearray, limits: Limits) -> Head | None:
    """The head at the start of the buffer, or None while it is incomplete. Raises errors.ApiError."""
    line_end = buffer.find(b"\n")
    if line_end < 0:
        _early(bytes(buffer), limits)
        return None
    end = buffer.find(b"\r\n\r\n")
    size = end + 4 if end >= 0 else len(buffer)
    head = bytes(buffer[:size])
    lines = head.split(b"\r\n")
    _request_line_size(lines[0], limits)
    if size > limits.head_bytes:
        raise errors.HeadersTooLarge(f"the headers are over {limits.head_bytes} bytes")
    if head.count(b"\n") > limits.fields + 2:
        raise errors.HeadersTooLarge(f"there are more than {limits.fields} headers")
    if any(b"\n" in line or (b"\r" in line[:-1] if end < 0 else b"\r" in line) for line in lines):
        raise errors.BadRequest("a line of the head does not end in CR LF", code="bad_http")
    method, target, minor = _request_line(lines[0])
    if end < 0:
        return None
    fields = [_field(line) for line in lines[1:-2]]
    return _head(method, target, minor, fields, size)


def _early(buffer: bytes, limits: Limits) -> None:
    """Refuses what can be seen to be no request line before its end has come."""
    _request_line_size(buffer, limits)
    if buffer and not re.match(rb"[!-~]", buffer[:1]):
        raise errors.BadRequest(
            "this is no HTTP request; if it was meant to be HTTPS, use http://", code="bad_http"
        )


def _request_line_size(line: bytes, limits: Limits) -> None:
    if len(line) > limits.target_bytes + 64:
        raise errors.UriTooLong(f"the request's target is over {limits.target_bytes} bytes")


def _request_line(line: bytes) -> tuple[str, bytes, int]:
    found = _REQUEST_LINE.fullmatch(line)
    if not found:
        raise errors.BadRequest("the first line is no HTTP/1.1 request line", code="bad_http")
    method, target, major, minor = found.groups()
    if (major, minor) not in ((b"1", b"0"), (b"1", b"1")):
        raise errors.VersionNotSupported("only HTTP/1.0 and HTTP/1.1 are spoken here")
    return method.decode(), target, int(minor)


def _field(line: bytes) -> tuple[bytes, bytes]:
    found = _FIELD.fullmatch(line)
    if not found:
        raise errors.BadRequest("a header is malformed, folded, or holds control characters", code="bad_http")
    return found[1].lower(), found[2]


def _head(method: str, target: bytes, minor: int, fields: list[tuple[bytes, bytes]], size: int) -> Head:
    def only(name: bytes) -> bytes | None:
        values = [value for key, value in fields if key == name]
        if len(values) > 1:
            raise errors.BadRequest(f"the header {name.decode()} comes more than once", code="bad_http")
        return values[0] if values else None

    host = only(b"host")
    if host is None and minor == 1:
        raise errors.BadRequest("HTTP/1.1 needs a Host header", code="bad_http")
    if host is not None and not _HOST.fullmatch(host):
        raise errors.BadRequest("the Host header is no host name", code="bad_http")
    if method in ("CONNECT", "TRACE"):
        raise errors.MethodNotAllowed(
            f"{method} is not allowed here", headers={"allow": "GET, HEAD, POST, OPTIONS"}
        )
    target = _origin_form(method, target, host)
    length, coding = only(b"content-length"), only(b"transfer-encoding")
    if coding is not None:
        if length is not None or minor == 0:
            raise errors.BadRequest(
                "Transfer-Encoding with a Content-Length or in HTTP/1.0 is ambiguous", code="bad_http"
            )
        if coding.lower() != b"chunked":
            raise errors.NotImplementedCoding("the only transfer coding spoken here is chunked")
    if length is not None and not _LENGTH.fullmatch(length):
        raise errors.BadRequest("the Content-Length is no plain number", code="bad_http")
    expect = only(b"expect")
    if expect is not None and expect.lower() != b"100-continue":
        raise errors.ExpectationFailed("the only expectation met here is 100-continue")
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
    """The target as a path, as it stands or from an absolute form that names this very host."""
    if target.startswith(b"/") or (target == b"*" and method == "OPTIONS"):
        return target
    absolute = re.fullmatch(rb"(?i:http)://([^/?#]+)(/[^#]*)?", target)
    if not absolute:
        raise errors.BadRequest("the request's target is no path", code="bad_http")
    if absolute[1].lower() != (host or b"").lower():
        raise errors.BadRequest(
            "the request's target and its Host header name different hosts", code="bad_http"
        )
    return absolute[2] or b"/"


class ChunkGate:
    """Walks over a chunked body's wire bytes: what belongs to it, and that its framing is strict."""

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
        """How many of these bytes belong to the body. Raises errors.ApiError."""
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
                raise errors.BadRequest("a chunk's size is malformed", code="bad_http")
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
            _field(line)
        else:
            self.done = True
