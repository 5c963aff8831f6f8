"""One request and its response.

Owns what a handler may do: read the body, respond whole or stream. A response's head goes through
h11, which keeps the rules of HTTP; a stream's body is written as ready bytes straight to the
transport, past h11, which is only told when it ends. It must not know routes or what is answered.
"""

import asyncio
import re
import secrets
from collections.abc import Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import Protocol

import h11

from tinyoai import errors
from tinyoai.web import sse
from tinyoai.web.request_head import Head

_SANE_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class ClientGone(Exception):
    """Nobody reads the answer any more, or too slowly."""


class Link(Protocol):
    """What an exchange needs of its connection."""

    @property
    def congested(self) -> bool:
        """The client reads slower than is written."""

    @property
    def closing(self) -> bool:
        """The server is being told to stop: no further request on this connection."""

    def write(self, data: bytes) -> None:
        """Bytes to the client, at once."""

    def speak(self, event: h11.Response | h11.InformationalResponse | h11.Data | h11.EndOfMessage) -> bytes:
        """An event's bytes, by h11's rules."""

    async def body(self) -> bytes:
        """The request's body, whole. Raises errors.ApiError."""

    async def uncongested(self) -> None:
        """When the client has caught up. Raises ClientGone."""

    def finished(self, *, close: bool) -> None:
        """The response is complete."""

    def unread(self) -> bool:
        """The request's body has not been read to its end."""


class Exchange:
    """One request, and the way to answer it."""

    __slots__ = (
        "_link",
        "_loop",
        "_started",
        "chunked",
        "client",
        "extra_headers",
        "finished",
        "head",
        "last_sent",
        "n_tokens",
        "peer",
        "refusal",
        "request_id",
        "route",
        "route_params",
        "status",
        "streaming",
    )

    def __init__(self, link: Link, head: Head, peer: str) -> None:
        # the request
        self.head = head
        self.peer = peer
        self.request_id = _request_id(head)
        self.route = ""
        """The path as the router knows it, without /v1; empty if nothing answers there."""
        self.route_params: dict[str, str] = {}
        self.client = ""
        """Who asks, as the guard knows them."""
        # the response
        self.n_tokens = 0
        """What the answer has cost so far, prompt and all."""
        self.extra_headers: list[tuple[str, str]] = []
        """On the response whatever it says: what a guard has to tell."""
        self.status = 0
        """0 until a response has begun."""
        self.refusal = ""
        """The code, or else the type, in the error body that it got."""
        self.streaming = False
        self.finished = False
        self.chunked = False
        """The stream's events need chunk framing; known once it has started."""
        self.last_sent = 0.0
        """The loop's time of the last write to a stream."""
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()

    @property
    def method(self) -> str:
        """The request's method."""
        return self.head.method

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the head was complete."""
        return (self._loop.time() - self._started) * 1000.0

    async def read_body(self) -> bytes:
        """The body, whole and within the limits. Raises errors.ApiError; asks for it if need be."""
        return await self._link.body()

    # -- responding --------------------------------------------------------------------------------

    def respond(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        """The whole response, not after start_stream. Nothing if one was given already or the client left."""
        if self.finished:
            return
        close = self._closes()
        fields = [*headers, ("content-type", content_type), ("content-length", str(len(body)))]
        if status == 204:
            fields = list(headers)
        data = self._head(status, fields, close)
        if body and self.method != "HEAD" and status != 204:
            data += self._link.speak(h11.Data(data=body))
        data += self._link.speak(h11.EndOfMessage())
        self._link.write(data)
        self._finish(close)

    def fail(self, error: errors.ApiError) -> None:
        """Says what went wrong: as a response if none has begun, else as an event that ends the stream."""
        if self.finished:
            return
        self.refusal = error.code or error.type
        if not self.status:
            self.respond(error.status, error.body(), headers=list(error.headers.items()))
        else:
            self.send(sse.event(error.body(), self.chunked))
            self.end_stream(close_after=True)

    def start_stream(self) -> None:
        """The head of a stream of events. A client of HTTP/1.0 gets no chunks: the close ends it."""
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
        self._link.write(self._head(200, fields, self._closes() or not self.chunked))
        self.streaming = self.method != "HEAD"
        self.last_sent = self._loop.time()

    def send(self, data: bytes) -> None:
        """Ready-made bytes of a stream, its chunk framing included: one write."""
        if self.finished or not self.streaming:
            return
        self._link.write(data)
        self.last_sent = self._loop.time()

    @property
    def congested(self) -> bool:
        """The client reads slower than is sent: time to drain."""
        return self._link.congested

    async def drain(self) -> None:
        """Waits until the client has caught up. Raises ClientGone if it does not in time."""
        await self._link.uncongested()

    def end_stream(self, *, close_after: bool = False) -> None:
        """The end of a stream."""
        if self.finished:
            return
        self._link.write(self._link.speak(h11.EndOfMessage()))
        self._finish(close_after or not self.chunked or self._closes())

    # -- inside ----------------------------------------------------------------------------------

    def _closes(self) -> bool:
        return self._link.closing or self._link.unread()

    def _head(self, status: int, fields: Sequence[tuple[str, str]], close: bool) -> bytes:
        headers = [
            ("date", formatdate(usegmt=True)),
            ("x-request-id", self.request_id),
            ("openai-processing-ms", f"{self.elapsed_ms:.3f}"),
            *self.extra_headers,
            *fields,
        ]
        if close:
            headers.append(("connection", "close"))
        data = self._link.speak(
            h11.Response(status_code=status, headers=headers, reason=_REASONS.get(status, b""))
        )
        self.status = status
        return data

    def _finish(self, close: bool) -> None:
        self.finished = True
        self._link.finished(close=close)


def _request_id(head: Head) -> str:
    """The client's own id if it is short and plain, else a new one."""
    given = (head.get(b"x-request-id") or b"").decode("latin-1")
    return given if _SANE_ID.fullmatch(given) else "req_" + secrets.token_hex(12)
