"""Flow control of a connection: writers wait for the client, and the kernel is asked what asyncio does not know."""

import asyncio
import fcntl
import select
import termios

from tinyoai.web.exchange import ClientGone

_HANGUP = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class WriteFlow:
    """The state of a client that reads slowly, and the handler that waits for it."""

    __slots__ = ("_waiter", "paused")

    def __init__(self) -> None:
        self.paused = False
        """The client reads slower than the server writes."""
        self._waiter: asyncio.Future[None] | None = None

    def pause(self) -> None:
        """The transport's buffer is full."""
        self.paused = True

    def resume(self) -> None:
        """The client has taken most of the buffer."""
        self.paused = False
        self._wake()

    def close(self) -> None:
        """The socket is gone: `drain` raises ClientGone."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ClientGone())

    async def drain(self, transport: asyncio.Transport, stall_s: float) -> None:
        """Waits until the client has caught up. Raises ClientGone after `stall_s` without progress."""
        loop = asyncio.get_running_loop()
        while self.paused:
            waiter = self._waiter = loop.create_future()
            before = unacked_bytes(transport)
            stalled = loop.call_later(stall_s, self._wake)
            try:
                await waiter
            finally:
                stalled.cancel()
                self._waiter = None
            if self.paused and unacked_bytes(transport) >= before:
                raise ClientGone

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def unacked_bytes(transport: asyncio.Transport) -> int:
    """Returns the number of written bytes that the client's machine has not acknowledged."""
    n = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    try:
        queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    except (AttributeError, OSError):
        return n  # no socket, or one without this number
    return n + int.from_bytes(queued, "little")


def has_hung_up(transport: asyncio.Transport) -> bool:
    """Returns whether the client closed the connection or its sending half, also if input is still unread."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return False
    poll = select.poll()
    poll.register(sock.fileno(), _HANGUP)
    return bool(poll.poll(0))
