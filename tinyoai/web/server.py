"""All connections of one listening socket: their count, the dispatch of requests, and the drain at the end."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from tinyoai import errors
from tinyoai.web.access import Access
from tinyoai.web.connection import Connection
from tinyoai.web.exchange import Exchange
from tinyoai.web.request_head import Limits
from tinyoai.web.routing import Handler, Router

log = logging.getLogger("tinyoai.web")


def elapsed_header(name: str) -> Callable[[Exchange], Sequence[tuple[str, str]]]:
    """Returns a function for `default_headers`: a header with the milliseconds since the request's head."""

    def headers(exchange: Exchange) -> Sequence[tuple[str, str]]:
        return [(name, f"{exchange.elapsed_ms:.3f}")]

    return headers


def _no_headers(_exchange: Exchange) -> Sequence[tuple[str, str]]:
    return ()


class Server:
    """The parts that all connections share, and the connections themselves."""

    def __init__(
        self,
        router: Router,
        access: Access,
        limits: Limits,
        on_done: Callable[[Exchange], None] | None = None,
        default_headers: Callable[[Exchange], Sequence[tuple[str, str]]] = _no_headers,
    ) -> None:
        """`on_done` is called for every exchange that ends, answered or abandoned. It must not raise.

        `default_headers` returns headers that every response of an exchange carries.
        """
        self.router = router
        self.access = access
        self.limits = limits
        self.default_headers = default_headers
        self._on_done = on_done
        self.connections: set[Connection] = set()
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._n_busy = 0

    def protocol_factory(self) -> Connection:
        """Returns a new connection, for loop.create_server."""
        return Connection(self)

    @property
    def n_busy(self) -> int:
        """The number of exchanges under way."""
        return self._n_busy

    # -- requests ----------------------------------------------------------------------------------

    def dispatch(self, exchange: Exchange) -> Handler:
        """Returns the handler of a request. Raises errors.ApiError if the client may not use it.

        A request without a route passes the access check first: only clients with access learn what exists.
        """
        try:
            handler = self._resolve(exchange)
        except errors.ApiError as error:
            handler = _refuse_with(error)
        self.access.check(exchange)
        return handler

    def _resolve(self, exchange: Exchange) -> Handler:
        head = exchange.head
        try:
            if head.target == b"*":
                raise errors.MethodNotAllowed("", headers={"allow": "GET, HEAD, POST, OPTIONS"})
            match = self.router.resolve(head.method, head.target)
        except errors.MethodNotAllowed as error:
            if head.method != "OPTIONS":
                raise
            exchange.local_pages = self._preflight_is_for_local_pages(exchange)
            return _answer_options(error.headers)
        exchange.route, exchange.route_params, exchange.local_pages = (
            match.route,
            match.params,
            match.local_pages,
        )
        return match.handler

    def _preflight_is_for_local_pages(self, exchange: Exchange) -> bool:
        """Returns the flag of the route that a preflight asks about."""
        method = exchange.head.get(b"access-control-request-method")
        if method is None or exchange.head.target == b"*":
            return False
        try:
            return self.router.resolve(method.decode("latin-1"), exchange.head.target).local_pages
        except errors.ApiError:
            return False

    def on_request_started(self) -> None:
        """Counts one exchange more."""
        self._n_busy += 1
        self._idle.clear()

    def on_request_finished(self, exchange: Exchange) -> None:
        """Counts one exchange less, charges the client for it and logs it."""
        self._n_busy -= 1
        if not self._n_busy:
            self._idle.set()
        self.access.on_request_finished(exchange)
        log.debug(
            "%s %s %s %d %.1f ms %s",
            exchange.peer,
            exchange.method,
            exchange.head.target[:200].decode("latin-1"),
            exchange.status,
            exchange.elapsed_ms,
            exchange.request_id,
        )
        if self._on_done is not None:
            self._on_done(exchange)

    # -- the end -----------------------------------------------------------------------------------

    def begin_drain(self) -> None:
        """Takes no further request on any connection, and closes the idle ones."""
        self.draining = True
        for connection in list(self.connections):
            connection.close_if_idle()

    async def wait_idle(self, seconds: float) -> bool:
        """Returns whether all exchanges ended within this time."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def abort(self) -> None:
        """Ends every exchange under way with an error, as its response or in its stream, and every connection."""
        self.draining = True
        for connection in list(self.connections):
            connection.abort()


def _answer_options(headers: dict[str, str]) -> Handler:
    """Returns a handler that lists the methods of a path."""

    async def handle(exchange: Exchange) -> None:
        exchange.respond(204, b"", headers=list(headers.items()))

    return handle


def _refuse_with(error: errors.ApiError) -> Handler:
    """Returns a handler that raises this error."""

    async def handle(exchange: Exchange) -> None:
        raise error

    return handle
