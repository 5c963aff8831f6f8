"""The body of one request: its framing, its size limit, and the handler that waits for it."""

import asyncio

import h11

from tinyoai import errors
from tinyoai.web.request_head import ChunkedFraming, Head, Limits


class RequestBody:
    """Takes a body's bytes, and none beyond them, from the front of a connection's input buffer."""

    __slots__ = (
        "_buffer",
        "_framing",
        "_http",
        "_limits",
        "_n_left",
        "_parts",
        "_size",
        "_waiter",
        "complete",
        "error",
    )

    def __init__(self, http: h11.Connection, head: Head, limits: Limits, buffer: bytearray) -> None:
        self._http = http
        self._limits = limits
        self._buffer = buffer
        self._framing = ChunkedFraming(limits) if head.chunked else None
        self._n_left = head.content_length
        self._parts: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self.complete = False
        """Every byte of it has arrived."""
        self.error: errors.ApiError | None = None
        """The reason why it cannot be read."""

    @property
    def begun(self) -> bool:
        """Part of it has arrived."""
        return self._size > 0

    def feed(self) -> None:
        """Moves the body's bytes from the buffer to h11."""
        while True:
            try:
                n = self._count()
            except errors.ApiError as error:
                self.fail(error)
                return
            if n:
                self._http.receive_data(bytes(self._buffer[:n]))
                del self._buffer[:n]
            self._take_events()
            if self.complete or self.error is not None or n == 0 or not self._buffer:
                return

    def fail(self, error: errors.ApiError) -> None:
        """Gives the body up: `read` raises the error."""
        self.error = error
        self._parts = []
        if self._framing is not None or isinstance(error, errors.PayloadTooLarge):
            self._buffer.clear()  # nobody can say where the next request begins
        self._wake()

    async def read(self) -> bytes:
        """Returns the whole body once it has arrived. Raises errors.ApiError."""
        while not self.complete and self.error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.error is not None:
            raise self.error
        whole, self._parts = b"".join(self._parts), []
        return whole

    def _count(self) -> int:
        """Returns how many of the buffer's bytes belong to the body. Raises errors.ApiError."""
        if self._framing is not None:
            return self._framing.feed(self._buffer)
        n = min(self._n_left, len(self._buffer))
        self._n_left -= n
        return n

    def _take_events(self) -> None:
        try:
            while not self.complete and self.error is None:
                event = self._http.next_event()
                if isinstance(event, h11.Data):
                    self._size += len(event.data)
                    self._parts.append(bytes(event.data))
                    if self._size > self._limits.body_bytes:
                        self.fail(errors.PayloadTooLarge(f"the body is over {self._limits.body_bytes} bytes"))
                elif isinstance(event, h11.EndOfMessage):
                    self.complete = True
                    self._wake()
                else:
                    return
        except h11.RemoteProtocolError as error:
            self.fail(errors.BadRequest(f"the body is malformed: {error}", code="bad_http"))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
