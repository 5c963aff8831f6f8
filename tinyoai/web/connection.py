"""Connections: bytes in, exchanges made and answered in order, time limits kept.

Owns a socket's life. States: head (a request's head is awaited) → busy (one exchange is under way, its
body may still be coming) → head again, or closing (whatever comes is thrown away until the peer has
read the answer). The next head is looked at only once the client has taken most of the answers before
it. The server's side of the books, who is connected and who is busy, is here too. It must not know
what handlers answer.

A client that closes its sending half counts as gone: it cannot be told from one that closed both, and
one that is gone must free its slot at once.
"""

import asyncio
import fcntl
import logging
import socket
import sys
import termios
from collections.abc import Callable
from typing import cast

import h11

from tinyoai import errors
from tinyoai.web.access import Guard
from tinyoai.web.exchange import ClientGone, Exchange
from tinyoai.web.request_head import ChunkGate, Head, Limits, read_head
from tinyoai.web.routing import Handler, Router

__all__ = ["Connection", "Limits", "Server"]

log = logging.getLogger("tinyoai.web")

HIGH_WATER = 64 << 10
"""Bytes written and not yet taken by the client, above which a stream waits."""
READ_AHEAD = 64 << 10
"""Bytes of later requests kept while one is answered."""


class Server:
    """All connections of one listening socket."""

    def __init__(
        self,
        router: Router,
        guard: Guard,
        limits: Limits,
        on_done: Callable[[Exchange], None] | None = None,
    ) -> None:
        # what decides
        self.router = router
        self.guard = guard
        self.limits = limits
        self.on_done = on_done
        """Told of every exchange that ended, answered or left; it must not raise."""
        # the books
        self.connections: set[Connection] = set()
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._n_busy = 0

    def protocol_factory(self) -> "Connection":
        """For loop.create_server."""
        return Connection(self)

    @property
    def n_busy(self) -> int:
        """Exchanges under way."""
        return self._n_busy

    def busy(self, change: int) -> None:
        """One exchange more, or one less."""
        self._n_busy += change
        if self._n_busy:
            self._idle.clear()
        else:
            self._idle.set()

    def begin_drain(self) -> None:
        """No further request on any connection; idle ones are closed."""
        self.draining = True
        for connection in list(self.connections):
            connection.close_if_idle()

    async def wait_idle(self, seconds: float) -> bool:
        """Whether all exchanges ended within so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def abort(self) -> None:
        """Ends what is still under way: each gets an error as its answer or in its stream."""
        for connection in list(self.connections):
            connection.abort()


class Connection(asyncio.Protocol):
    """One client's connection, and the Link of its exchanges."""

    def __init__(self, server: Server) -> None:
        # shared
        self._server = server
        self._limits = server.limits
        self._loop = asyncio.get_running_loop()
        # as long as the socket lives
        self._transport: asyncio.Transport
        self._peer = ""
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        self._buffer = bytearray()
        self._state = "head"
        self._timer: asyncio.TimerHandle | None = None
        self._gone = False
        self._outstanding = 0
        """Bytes the client had not taken when the timer was last set."""
        # as long as a head is awaited
        self._head_begun = True
        """Its time runs: from the accept, later from its first byte."""
        self._blank_seen = False
        self._paused = False
        self._writable: asyncio.Future[None] | None = None
        # as long as the request
        self._exchange: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self._chunk_gate: ChunkGate | None = None
        self._left = 0
        self._body: list[bytes] = []
        self._body_size = 0
        self._body_done = True
        self._body_error: errors.ApiError | None = None
        self._body_waiter: asyncio.Future[None] | None = None

    # -- asyncio's calls ---------------------------------------------------------------------------

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
                f"{self._limits.connections} connections are open already", headers={"retry-after": "1"}
            )
            self._refuse(error)
            return
        self._arm(self._limits.head_s)

    def data_received(self, data: bytes) -> None:
        if self._state == "closing":
            return
        self._buffer += data
        if self._state == "head":
            if not self._head_begun:
                self._head_begun = True
                self._arm(self._limits.head_s)
            self._read_heads()
        else:
            self._read_body()
        if len(self._buffer) > READ_AHEAD and self._state != "closing":
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._cancel()
        if self._state != "closing":
            self._state = "closing"
            self._buffer.clear()
            self._arm(self._limits.stall_s)
        return False  # asyncio closes the transport once all is written: the timer sees to it that this ends

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        self._disarm()
        self._server.connections.discard(self)
        self._cancel()
        if self._writable is not None and not self._writable.done():
            self._writable.set_exception(ClientGone())

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._read_heads()

    # -- the server's calls ------------------------------------------------------------------------

    def close_if_idle(self) -> None:
        """Ends a kept-alive connection between two requests."""
        if self._state == "head" and not self._buffer:
            self._close()

    def abort(self) -> None:
        """Ends the exchange under way with an error, and the connection."""
        if self._exchange is not None and not self._exchange.finished:
            self._exchange.fail(
                errors.Unavailable("the server was told to stop", headers={"retry-after": "5"})
            )
            if self._task is not None:
                self._task.cancel()
        else:
            self._close()

    # -- the exchange's calls (Link) -----------------------------------------------------------------

    @property
    def congested(self) -> bool:
        """The client reads slower than is written."""
        return self._paused

    @property
    def closing(self) -> bool:
        """No further request is wanted here."""
        return self._server.draining

    def write(self, data: bytes) -> None:
        """Bytes to the client, if there still is one."""
        if not self._gone:
            self._transport.write(data)

    def speak(self, event: h11.Response | h11.InformationalResponse | h11.Data | h11.EndOfMessage) -> bytes:
        """An event's bytes, by h11's rules."""
        return self._http.send(event) or b""

    def unread(self) -> bool:
        """Part of the request's body is still to come."""
        return not self._body_done

    async def body(self) -> bytes:
        """The request's body. Raises errors.ApiError."""
        exchange = self._exchange
        if not self._body_done and exchange is not None and exchange.head.expects_continue and not self._body:
            self.write(self.speak(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")))
        while not self._body_done and self._body_error is None:
            self._body_waiter = self._loop.create_future()
            try:
                await self._body_waiter
            finally:
                self._body_waiter = None
        if self._body_error is not None:
            raise self._body_error
        whole, self._body = b"".join(self._body), []
        return whole

    async def uncongested(self) -> None:
        """When the client has caught up. Raises ClientGone after too long without progress."""
        while self._paused:
            waiter = self._writable = self._loop.create_future()
            before = self._untaken()
            stalled = self._loop.call_later(self._limits.stall_s, self._stalled, waiter)
            try:
                await waiter
            finally:
                stalled.cancel()
                self._writable = None
            if self._paused and self._untaken() >= before:
                raise ClientGone

    def finished(self, *, close: bool) -> None:
        """The response is complete: on to the next request, or the end."""
        if self._gone:
            return
        if self._exchange is not None:
            self._account(self._exchange)
        if (
            close
            or self.unread()
            or self._http.our_state is not h11.DONE
            or self._http.their_state is not h11.DONE
        ):
            self._linger()
            return
        self._http.start_next_cycle()
        self._exchange = None
        self._state = "head"
        self._blank_seen = False
        self._head_begun = bool(self._buffer)
        self._arm(self._limits.head_s if self._buffer else self._limits.idle_s)
        if self._buffer:
            # not at once: the stack of a client that pipelines would grow with its requests
            self._loop.call_soon(self._read_heads)
        else:
            self._transport.resume_reading()

    # -- reading -----------------------------------------------------------------------------------

    def _read_heads(self) -> None:
        if self._state != "head" or self._gone or self._paused:
            return
        if self._buffer.startswith(b"\r\n") and not self._blank_seen:
            # some clients end a body with a line that belongs to nothing (RFC 9112, 2.2)
            self._blank_seen = True
            del self._buffer[:2]
        if not self._buffer:
            self._transport.resume_reading()
            return
        try:
            head = read_head(self._buffer, self._limits)
        except errors.ApiError as error:
            self._refuse(error)
            return
        if head is None:
            self._transport.resume_reading()
        else:
            self._begin(head)

    def _begin(self, head: Head) -> None:
        """A whole head is there: who is asked, and may they?"""
        self._disarm()
        self._state = "busy"
        raw = bytes(self._buffer[: head.size])
        del self._buffer[: head.size]
        self._body, self._body_size, self._body_error = [], 0, None
        self._body_done = False
        self._left = head.content_length
        self._chunk_gate = ChunkGate(self._limits) if head.chunked else None
        try:
            self._http.receive_data(raw)
            if not isinstance(self._http.next_event(), h11.Request):
                raise errors.BadRequest("this is no HTTP/1.1 request", code="bad_http")
        except h11.RemoteProtocolError as error:
            self._refuse(errors.BadRequest(f"this is no HTTP/1.1 request: {error}", code="bad_http"))
            return
        except errors.ApiError as error:
            self._refuse(error)
            return
        exchange = self._exchange = Exchange(self, head, self._peer)
        self._server.busy(+1)
        self._read_body()
        if self._state != "busy":
            return
        try:
            handler = self._route(exchange)
        except errors.ApiError as error:
            handler = _refusing(error)  # told only to those who may know
        try:
            self._server.guard.check(exchange)
            if self._body_error is not None:
                raise self._body_error
            if head.content_length > self._limits.body_bytes:
                raise errors.PayloadTooLarge(
                    f"the body has {head.content_length} bytes; at most {self._limits.body_bytes} are read"
                )
        except errors.ApiError as error:
            exchange.fail(error)
            return
        if not self._body_done:
            self._arm(self._limits.body_s)
        self._task = self._loop.create_task(self._run(exchange, handler))

    def _route(self, exchange: Exchange) -> Handler:
        method, target = exchange.head.method, exchange.head.target
        try:
            if target == b"*":
                raise errors.MethodNotAllowed("", headers={"allow": "GET, HEAD, POST, OPTIONS"})
            handler, exchange.route_params, exchange.route = self._server.router.resolve(method, target)
        except errors.MethodNotAllowed as error:
            if method != "OPTIONS":
                raise
            return _options(error.headers)
        return handler

    def _read_body(self) -> None:
        """Gives the body's bytes, and no byte beyond them, to h11."""
        while self._buffer and not self._body_done and self._body_error is None:
            try:
                n = (
                    self._chunk_gate.feed(self._buffer)
                    if self._chunk_gate
                    else min(self._left, len(self._buffer))
                )
            except errors.ApiError as error:
                self._end_body(error)
                return
            if n == 0:
                break
            self._left -= n
            self._http.receive_data(bytes(self._buffer[:n]))
            del self._buffer[:n]
            self._take_body()
        if not self._body_done and self._body_error is None:
            self._take_body()
        if not self._body_done:
            self._transport.resume_reading()

    def _take_body(self) -> None:
        try:
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Data):
                    self._body.append(bytes(event.data))
                    self._body_size += len(event.data)
                    if self._body_size > self._limits.body_bytes:
                        self._end_body(
                            errors.PayloadTooLarge(f"the body is over {self._limits.body_bytes} bytes")
                        )
                        return
                elif isinstance(event, h11.EndOfMessage):
                    self._body_done = True
                    self._disarm()
                    self._end_body(None)
                    return
                else:
                    return
        except h11.RemoteProtocolError as error:
            self._end_body(errors.BadRequest(f"the body is malformed: {error}", code="bad_http"))

    def _end_body(self, error: errors.ApiError | None) -> None:
        if error is not None:
            self._body_error = error
            self._body = []
            if self._chunk_gate is not None or isinstance(error, errors.PayloadTooLarge):
                self._buffer.clear()
        if self._body_waiter is not None and not self._body_waiter.done():
            self._body_waiter.set_result(None)

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
                raise  # by _cancel: nobody waits for the answer
            self._fault(exchange)
        except Exception:
            self._fault(exchange)

    def _fault(self, exchange: Exchange) -> None:
        log.exception("request %s failed", exchange.request_id)
        exchange.fail(
            errors.InternalError(f"internal error; the log has more under request id {exchange.request_id}")
        )

    def _refuse(self, error: errors.ApiError) -> None:
        """Answers what is not even a request: h11 knows nothing of it, so the head is written by hand."""
        head = Head(
            method="", target=b"", minor=1, fields=[], size=0, content_length=0, chunked=False, expects_continue=False
        )  # fmt: skip
        self._http = h11.Connection(h11.SERVER)
        self._body_done = False  # whatever follows belongs to nothing
        self._state = "busy"
        exchange = self._exchange = Exchange(self, head, self._peer)
        self._server.guard.tell(exchange)
        self._server.busy(+1)
        exchange.fail(error)

    def _account(self, exchange: Exchange) -> None:
        self._server.busy(-1)
        self._server.guard.done(exchange)
        log.debug(
            "%s %s %s %d %.1f ms %s",
            self._peer,
            exchange.method,
            exchange.head.target[:200].decode("latin-1"),
            exchange.status,
            exchange.elapsed_ms,
            exchange.request_id,
        )
        if self._server.on_done is not None:
            self._server.on_done(exchange)

    # -- ending ------------------------------------------------------------------------------------

    def _cancel(self) -> None:
        """Nobody waits for the answer any more."""
        exchange = self._exchange
        if exchange is None or exchange.finished:
            return
        exchange.finished = True
        self._account(exchange)
        if self._task is not None and not self._task.done():
            self._task.cancel()

    def _stalled(self, waiter: "asyncio.Future[None]") -> None:
        if not waiter.done():
            waiter.set_result(None)

    def _close(self) -> None:
        """Closes once all is written, and in any case soon."""
        self._state = "closing"
        self._disarm()
        self._transport.close()
        self._timer = self._loop.call_later(self._limits.stall_s, self._transport.abort)

    def _linger(self) -> None:
        """Closes the sending half and reads on a little: a reset would destroy the answer on its way."""
        self._state = "closing"
        self._buffer.clear()
        self._transport.resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._arm(self._limits.linger_s)
        self._outstanding = sys.maxsize  # what is still on its way then has the time of a stalled reader

    # -- time --------------------------------------------------------------------------------------

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._outstanding = self._untaken()
        self._timer = self._loop.call_later(seconds, self._too_slow)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _untaken(self) -> int:
        """Bytes of answers that the client's machine has not acknowledged."""
        n = self._transport.get_write_buffer_size()
        sock = self._transport.get_extra_info("socket")
        try:
            queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
        except (AttributeError, OSError):
            return n  # no socket, or one that cannot tell
        return n + int.from_bytes(queued, "little")

    def _too_slow(self) -> None:
        self._timer = None
        untaken = self._untaken()
        if untaken and (self._paused or self._state == "closing"):
            # the next head is not read, or the end not made, before the answers are taken: while they are, wait
            if untaken < self._outstanding:
                self._arm(self._limits.stall_s)
            else:
                self._transport.abort()
        elif self._state == "closing" or (self._state == "head" and not self._buffer):
            self._close()  # it asked for nothing
        elif self._state == "head":
            self._refuse(errors.RequestTimeout("the request's head did not come in time"))
        elif not self._body_done:
            self._end_body(errors.RequestTimeout("the request's body did not come in time"))


def _options(headers: dict[str, str]) -> Handler:
    """Answers what may be done with a path."""

    async def tell(exchange: Exchange) -> None:
        exchange.respond(204, b"", headers=list(headers.items()))

    return tell


def _refusing(error: errors.ApiError) -> Handler:
    """Answers with a refusal."""

    async def refuse(exchange: Exchange) -> None:
        raise error

    return refuse
