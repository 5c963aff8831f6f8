"""Starts a worker process. Imports no asyncio, so a worker can start before the server's own imports."""

import socket
from typing import TYPE_CHECKING

from tinyoai.host import subproc
from tinyoai.host.process import PIPE, Process

PROGRAM = ("-m", "tinyoai.engine")
"""Python's arguments; the number of the socket's descriptor follows them."""


if TYPE_CHECKING:
    from tinyoai import wire


class SpawnedWorker:
    """A worker process that waits for its Load, and the server's end of the socket to it."""

    def __init__(self, process: Process, sock: socket.socket) -> None:
        self.process = process
        self.sock = sock
        self.load: wire.Load | None = None
        """The Load that it was sent ahead."""

    def send(self, load: "wire.Load") -> None:
        """Sends the Load before an event loop takes the worker over. Raises OSError if its process has ended."""
        from tinyoai import wire

        self.load = load
        self.sock.sendall(wire.frame([load]))

    def close(self) -> None:
        """Ends a worker that nobody took over."""
        self.sock.close()
        self.process.close()


def spawn_worker() -> SpawnedWorker:
    """Starts a worker process for any model and engine. Raises OSError if it cannot be started."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = Process(
                [*subproc.PYTHON, *PROGRAM, str(theirs.fileno())],
                env=subproc.environment(),
                pass_fds=(theirs.fileno(),),
                stderr=PIPE,
            )
        except BaseException:
            ours.close()
            raise
    ours.setblocking(False)
    return SpawnedWorker(process, ours)
