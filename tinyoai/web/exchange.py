"""One request and its response: the interface of every handler.

A response's head goes through h11, which keeps the rules of HTTP. A stream's body is written as ready
bytes straight to the transport; h11 learns only that it ends.
"""

import functools
import re
import secrets
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

import h11

from tinyoai import errors
from tinyoai.web import sse
from tinyoai.web.request_head import Head

if TYPE_CHECKING:
    from tinyoai.web.flow import WriteFlow

_DATE = "%a, %d %b %Y %H:%M:%S GMT"
"""An HTTP date. No code calls setlocale, so the names are English."""
_PLAIN_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class ClientGone(Exception):
    """The client has left, or reads too slowly."""


class Link(Protocol):
    """The connection, as an exchange uses it."""

    @property
    def clock(self) -> Callable[[], float]:
        """Returns the event loop's time in seconds."""

    @property
    def flow(self) -> "WriteFlow":
        """Tells whether the client takes what is written."""

    @property
    def closing(self) -> bool:
        """The server takes no further request on this connection."""

    @property
    def body_unread(self) -> bool:
        """Part of the request's body has not arrived."""

    def write(self, data: bytes) -> None:
        """Sends bytes to the client at once."""

    def encode(self, event: h11.Response | h11.InformationalResponse | h11.Data | h11.EndOfMessage) -> bytes:
        """Returns an event's bytes, checked by h11."""

    def default_headers(self, exchange: "Exchange") -> Sequence[tuple[str, str]]:
        """Returns the headers that every response carries."""

    async def read_body(self) -> bytes:
        """Returns the whole body of the request. Raises errors.ApiError."""

    async def drain(self) -> None:
        """Waits until the client has caught up. Raises ClientGone."""

    def on_request_finished(self, *, close: bool) -> None:
        """The response is complete."""


class Exchange:
    """One request, and the means to answer it."""

    __slots__ = (
        "_clock",
        "_link",
        "chunked",
        "client",
        "extra_headers",
        "finished",
        "head",
        "last_sent",
        "local_pages",
        "n_tokens",
        "peer",
        "refusal",
        "request_id",
        "route",
        "route_params",
        "scope",
        "started",
        "status",
        "streaming",
    )

    def __init__(self, link: Link, head: Head, peer: str) -> None:
        # the request
        self.head = head
        self.peer = peer
        """The client's address."""
        self.request_id = _request_id(head)
        self.route = ""
        """The route's path without a prefix. Empty if the request has no route."""
        self.route_params: dict[str, str] = {}
        self.local_pages = False
        """The route, or the one that a preflight asks about, is open to web pages from loopback origins."""
        self.client = ""
        """The client for fairness and rate limits: its key's owner or its address. Set by the access check."""
        self.scope = ""
        """Computed prompts are reused by requests of the same scope only. Set by the access check."""
        # the response
        self.n_tokens = 0
        """The number of tokens that the client is charged for."""
        self.extra_headers: list[tuple[str, str]] = []
        """Headers of the response, whatever its status."""
        self.status = 0
        """0 until a response has begun."""
        self.refusal = ""
        """The code, or else the type, of the error that was sent."""
        self.streaming = False
        self.finished = False
        self.chunked = False
        """The stream's events need chunk framing. Valid after start_stream."""
        self.last_sent = 0.0
        """The loop's time of the last write to a stream."""
        self._link = link
        self._clock = link.clock
        self.started = self._clock()
        """The loop's time at which the head was complete."""

    @property
    def method(self) -> str:
        """The request's method."""
        return self.head.method

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the head was complete."""
        return (self._clock() - self.started) * 1000.0

    async def read_body(self) -> bytes:
        """Returns the whole body. Raises errors.ApiError."""
        return await self._link.read_body()

    # -- responding --------------------------------------------------------------------------------

    def respond(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Sends a whole response. Does nothing if the exchange is finished. Not after start_stream."""
        if self.finished:
            return
        close = self._closes()
        fields = [*headers, ("content-type", content_type), ("content-length", str(len(body)))]
        if status == 204:
            fields = list(headers)
        data = self._encode_head(status, fields, close)
        if body and self.method != "HEAD" and status != 204:
            data += self._link.encode(h11.Data(data=body))
        data += self._link.encode(h11.EndOfMessage())
        self._link.write(data)
        self._finish(close)

    def fail(self, error: errors.ApiError) -> None:
        """Sends an error: as the response if none has begun, else as an event that ends the stream."""
        if self.finished:
            return
        self.refusal = error.code or error.type
        if not self.status:
            self.respond(error.status, error.body(), headers=list(error.headers.items()))
        else:
            self.send(sse.event(error.body(), self.chunked))
            self.end_stream(close_after=True)

    def start_stream(self) -> None:
        """Sends the head of an event stream. An HTTP/1.0 client gets no chunks: the close ends its stream."""
        if self.finished:
            return
        self.chunked = self.head.minor >= 1
        fields = [
            ("content-type", "text/event-stream; charset=utf-8"),
            ("cache-control", "no-cache"),
            ("x-accel-buffering", "no"),
        ]
        if self.chunked:
            fields.append(("transfer-encoding", "chunked"))
        self._link.write(self._encode_head(200, fields, self._closes() or not self.chunked))
        self.streaming = self.method != "HEAD"
        self.last_sent = self._clock()

    def send(self, data: bytes) -> None:
        """Sends ready-made bytes of a stream, including their chunk framing, in one write."""
        if self.finished or not self.streaming:
            return
        self._link.write(data)
        self.last_sent = self._clock()

    @property
    def congested(self) -> bool:
        """The client reads slower than the server sends: call drain before sending more."""
        return self._link.flow.paused

    async def drain(self) -> None:
        """Waits until the client has caught up. Raises ClientGone if it does not in time."""
        await self._link.drain()

    def end_stream(self, *, close_after: bool = False) -> None:
        """Sends the end of a stream."""
        if self.finished:
            return
        self._link.write(self._link.encode(h11.EndOfMessage()))
        self._finish(close_after or not self.chunked or self._closes())

    # -- inside ----------------------------------------------------------------------------------

    def _closes(self) -> bool:
        return self._link.closing or self._link.body_unread

    def _encode_head(self, status: int, fields: Sequence[tuple[str, str]], close: bool) -> bytes:
        headers = [
            ("date", _date(int(time.time()))),
            ("x-request-id", self.request_id),
            *self._link.default_headers(self),
            *self.extra_headers,
            *fields,
        ]
        if close:
            headers.append(("connection", "close"))
        data = self._link.encode(
            h11.Response(status_code=status, headers=headers, reason=_REASONS.get(status, b""))
        )
        self.status = status
        return data

    def _finish(self, close: bool) -> None:
        self.finished = True
        self._link.on_request_finished(close=close)


@functools.lru_cache(maxsize=1)
def _date(second: int) -> str:
    return time.strftime(_DATE, time.gmtime(second))


def _request_id(head: Head) -> str:
    """Returns the client's own id if it is short and plain, else a new one."""
    given = (head.get(b"x-request-id") or b"").decode("latin-1")
    return given if _PLAIN_ID.fullmatch(given) else "req_" + secrets.token_hex(12)
