"""One client's connection: bytes in, exchanges created and answered in order, time limits enforced.

`states` holds the states and their transitions. The next head is read only once the client has taken
most of the responses before it.

A client that closes its sending half counts as gone: it looks the same as one that closed both, and
one that is gone must free its slot at once.
"""

import asyncio
import logging
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import h11

from tinyoai import errors
from tinyoai.web.body import RequestBody
from tinyoai.web.exchange import ClientGone, Exchange
from tinyoai.web.flow import WriteFlow, has_hung_up, unacked_bytes
from tinyoai.web.request_head import NO_HEAD, Head, read_head
from tinyoai.web.routing import Handler
from tinyoai.web.states import Event, State, after

if TYPE_CHECKING:
    from tinyoai.web.server import Server

log = logging.getLogger("tinyoai.web")

HIGH_WATER = 64 << 10
"""Bytes written and not yet taken by the client, above which a stream waits."""
READ_AHEAD = 64 << 10
"""Bytes of later requests kept while one is answered. Above that, reading pauses."""
HANGUP_CHECK_S = 1.0
"""Interval of the check whether a client has left, while reading is paused: no end of file arrives then."""
_CLOSED = State.CLOSED


class Connection(asyncio.Protocol):
    """One client's connection, and the Link of its exchanges."""

    def __init__(self, server: "Server") -> None:
        # shared
        self._server = server
        self._limits = server.limits
        self._loop = asyncio.get_running_loop()
        self.clock = self._loop.time
        # of the socket
        self._transport: asyncio.Transport
        self._peer = ""
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        self._buffer = bytearray()
        self._state = State.HEAD
        self._timer: asyncio.TimerHandle | None = None
        self._unacked_before = 0
        """Bytes that the client had not taken when the timer was started."""
        self._hangup_check: asyncio.TimerHandle | None = None
        self.flow = WriteFlow()
        # of the next head
        self._head_begun = True
        """Its time limit runs: from the accept, later from its first byte."""
        self._blank_seen = False
        # of the request
        self._exchange: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self._body: RequestBody | None = None

    # -- called by asyncio -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if peer else ""
        self._server.connections.add(self)
        if len(self._server.connections) > self._limits.connections:
            error = errors.Unavailable(
                f"the limit of {self._limits.connections} connections is reached",
                headers={"retry-after": "1"},
            )
            self._refuse(error)
            return
        self._start_timer(self._limits.head_s)

    def data_received(self, data: bytes) -> None:
        if self._state is State.CLOSING:
            return
        self._buffer += data
        if self._state is State.HEAD:
            if not self._head_begun:
                self._head_begun = True
                self._start_timer(self._limits.head_s)
            self._read_heads()
        else:
            self._read_body()
        if len(self._buffer) > READ_AHEAD:
            self._pause_reading()

    def eof_received(self) -> bool:
        self._on_client_left()
        return False  # asyncio closes the transport once all is written, within the timer's limit

    def connection_lost(self, exc: Exception | None) -> None:
        self._move(Event.LOST)
        self._stop_timer()
        self._stop_hangup_check()
        self._server.connections.discard(self)
        self._abandon_exchange()
        self.flow.close()

    def pause_writing(self) -> None:
        self.flow.pause()

    def resume_writing(self) -> None:
        self.flow.resume()
        self._read_heads()

    # -- called by the server ----------------------------------------------------------------------

    def close_if_idle(self) -> None:
        """Closes the connection if it waits for a request and none has begun."""
        if self._state is State.HEAD and not self._buffer:
            self._close()

    def abort(self) -> None:
        """Ends the exchange under way with an error, and the connection."""
        if self._exchange is not None and not self._exchange.finished:
            self._exchange.fail(
                errors.Unavailable("the server is shutting down", headers={"retry-after": "5"})
            )
            if self._task is not None:
                self._task.cancel()
        else:
            self._close()

    # -- called by the exchange (Link) -------------------------------------------------------------

    @property
    def closing(self) -> bool:
        """The server takes no further request on this connection."""
        return self._server.draining

    @property
    def body_unread(self) -> bool:
        """Part of the request's body has not arrived, or the request's end is unknown."""
        return self._body is None or not self._body.complete

    def write(self, data: bytes) -> None:
        """Sends bytes to the client, unless it is gone."""
        if self._state is not _CLOSED:
            self._transport.write(data)

    def encode(self, event: h11.Response | h11.InformationalResponse | h11.Data | h11.EndOfMessage) -> bytes:
        """Returns an event's bytes, checked by h11."""
        return self._http.send(event) or b""

    def default_headers(self, exchange: Exchange) -> Sequence[tuple[str, str]]:
        """Returns the headers that every response carries."""
        return self._server.default_headers(exchange)

    async def read_body(self) -> bytes:
        """Returns the request's body. Asks the client for it if it waits for that. Raises errors.ApiError."""
        assert self._exchange is not None
        assert self._body is not None
        if self._exchange.head.expects_continue and not self._body.complete and not self._body.begun:
            self.write(
                self.encode(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
            )
        return await self._body.read()

    async def drain(self) -> None:
        """Waits until the client has caught up. Raises ClientGone after `stall_s` without progress."""
        await self.flow.drain(self._transport, self._limits.stall_s)

    def on_request_finished(self, *, close: bool) -> None:
        """The response is complete: waits for the next request, or closes."""
        if self._state is State.CLOSED:
            return
        if self._exchange is not None:
            self._server.on_request_finished(self._exchange)
        if (
            close
            or self.body_unread
            or self._http.our_state is not h11.DONE
            or self._http.their_state is not h11.DONE
        ):
            self._linger()
            return
        self._http.start_next_cycle()
        self._exchange = None
        self._move(Event.KEEP_ALIVE)
        self._blank_seen = False
        self._head_begun = bool(self._buffer)
        self._start_timer(self._limits.head_s if self._buffer else self._limits.idle_s)
        if self._buffer:
            # not at once: the stack of a client that pipelines would grow with its requests
            self._loop.call_soon(self._read_heads)
        else:
            self._resume_reading()

    # -- reading -----------------------------------------------------------------------------------

    def _move(self, event: Event) -> None:
        self._state = after(self._state, event)

    def _read_heads(self) -> None:
        if self._state is not State.HEAD or self.flow.paused:
            return
        if self._buffer.startswith(b"\r\n") and not self._blank_seen:
            # some clients send an empty line after a body (RFC 9112, 2.2)
            self._blank_seen = True
            del self._buffer[:2]
        if not self._buffer:
            self._resume_reading()
            return
        try:
            head = read_head(self._buffer, self._limits)
            if head is None:
                self._resume_reading()
                return
            self._parse(head)
        except errors.ApiError as error:
            self._refuse(error)
            return
        self._begin(head)

    def _parse(self, head: Head) -> None:
        """Gives the head to h11. Raises errors.BadRequest if h11 refuses it, which is rare."""
        raw = bytes(self._buffer[: head.size])
        del self._buffer[: head.size]
        try:
            self._http.receive_data(raw)
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            raise errors.BadRequest(f"not an HTTP/1.1 request: {error}", code="bad_http") from None
        if not isinstance(event, h11.Request):
            raise errors.BadRequest("not an HTTP/1.1 request", code="bad_http")

    def _begin(self, head: Head) -> None:
        """Starts the exchange of a complete head: routing, access, and the handler's task."""
        self._stop_timer()
        self._move(Event.REQUEST)
        body = self._body = RequestBody(self._http, head, self._limits, self._buffer)
        exchange = self._exchange = Exchange(self, head, self._peer)
        self._server.on_request_started()
        self._read_body()
        try:
            handler = self._server.dispatch(exchange)
            if body.error is not None:
                raise body.error
            if head.content_length > self._limits.body_bytes:
                raise errors.PayloadTooLarge(
                    f"the body has {head.content_length} bytes; the limit is {self._limits.body_bytes}"
                )
        except errors.ApiError as error:
            exchange.fail(error)
            return
        if not body.complete:
            self._start_timer(self._limits.body_s)
        self._task = self._loop.create_task(self._run(exchange, handler))

    def _read_body(self) -> None:
        body = self._body
        if body is None or body.complete:
            return
        body.feed()
        if body.complete:
            self._stop_timer()
        else:
            self._resume_reading()

    def _pause_reading(self) -> None:
        self._transport.pause_reading()
        if self._hangup_check is None:
            self._hangup_check = self._loop.call_later(HANGUP_CHECK_S, self._check_hangup)

    def _resume_reading(self) -> None:
        self._stop_hangup_check()
        self._transport.resume_reading()

    def _stop_hangup_check(self) -> None:
        if self._hangup_check is not None:
            self._hangup_check.cancel()
            self._hangup_check = None

    def _check_hangup(self) -> None:
        """Looks for a client that left while reading is paused."""
        self._hangup_check = self._loop.call_later(HANGUP_CHECK_S, self._check_hangup)
        if has_hung_up(self._transport):
            self._on_client_left()
            self._resume_reading()  # discards the rest. A reset would destroy responses on their way.

    # -- answering ---------------------------------------------------------------------------------

    async def _run(self, exchange: Exchange, handler: Handler) -> None:
        try:
            await handler(exchange)
            if not exchange.finished:
                raise RuntimeError("the handler did not answer")
        except errors.ApiError as error:
            exchange.fail(error)
        except ClientGone:
            self._transport.abort()
        except asyncio.CancelledError:
            if exchange.finished:
                raise  # by _abandon_exchange: nobody waits for the response
            self._fail_internally(exchange)
        except Exception:
            self._fail_internally(exchange)

    def _fail_internally(self, exchange: Exchange) -> None:
        log.exception("request %s failed", exchange.request_id)
        exchange.fail(
            errors.InternalError(f"internal error; see request id {exchange.request_id} in the log")
        )

    def _refuse(self, error: errors.ApiError) -> None:
        """Answers input that is not a request. h11 has no request to answer, so it gets a fresh state."""
        self._http = h11.Connection(h11.SERVER)
        self._body = None  # the bytes that follow belong to no request
        self._move(Event.REQUEST)
        exchange = self._exchange = Exchange(self, NO_HEAD, self._peer)
        self._server.access.add_rate_headers(exchange)
        self._server.on_request_started()
        exchange.fail(error)

    # -- ending ------------------------------------------------------------------------------------

    def _abandon_exchange(self) -> None:
        """Ends the exchange under way without a response: nobody waits for it."""
        exchange = self._exchange
        if exchange is None or exchange.finished:
            return
        exchange.finished = True
        self._server.on_request_finished(exchange)
        if self._task is not None and not self._task.done():
            self._task.cancel()

    def _on_client_left(self) -> None:
        """Ends the exchange, and gives the client's machine `stall_s` to take what is written already."""
        self._abandon_exchange()
        if self._state is not State.CLOSING:
            self._move(Event.CLIENT_LEFT)
            self._buffer.clear()
            self._start_timer(self._limits.stall_s)

    def _close(self) -> None:
        """Closes once everything is written, and in any case after `stall_s`."""
        self._move(Event.CLOSE)
        self._stop_timer()
        self._stop_hangup_check()
        self._transport.close()
        self._timer = self._loop.call_later(self._limits.stall_s, self._transport.abort)

    def _linger(self) -> None:
        """Closes the sending half and reads on for a while: a reset would destroy the response on its way."""
        self._move(Event.CLOSE)
        self._buffer.clear()
        self._resume_reading()
        try:
            self._transport.write_eof()
        except OSError:
            self._transport.abort()  # the client has reset the connection
        self._start_timer(self._limits.linger_s)
        self._unacked_before = sys.maxsize  # bytes still on their way then get the time of a stalled reader

    # -- time --------------------------------------------------------------------------------------

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        # where nothing waits to be taken, no progress can be seen, and the kernel need not be asked
        waits = self.flow.paused or self._state is State.CLOSING
        self._unacked_before = unacked_bytes(self._transport) if waits else sys.maxsize
        self._timer = self._loop.call_later(seconds, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        self._timer = None
        unacked = unacked_bytes(self._transport)
        if unacked and (self.flow.paused or self._state is State.CLOSING):
            # the next head, or the end, waits until the responses are taken: progress earns more time
            if unacked < self._unacked_before:
                self._start_timer(self._limits.stall_s)
            else:
                self._transport.abort()
        elif self._state is State.CLOSING or (self._state is State.HEAD and not self._buffer):
            self._close()  # no request has begun
        elif self._state is State.HEAD:
            self._refuse(errors.RequestTimeout("timed out while reading the request's head"))
        elif self._body is not None and not self._body.complete:
            self._body.fail(errors.RequestTimeout("timed out while reading the request's body"))
