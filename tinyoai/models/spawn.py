"""Starts a worker process. Imports no asyncio, so a worker can start before the server's own imports."""

import socket
from typing import NamedTuple

from tinyoai.host import subproc
from tinyoai.host.process import PIPE, Process

PROGRAM = ("-m", "tinyoai.engine")
"""Python's arguments; the number of the socket's descriptor follows them."""


class SpawnedWorker(NamedTuple):
    """A worker process that waits for its Load, and the server's end of the socket to it."""

    process: Process
    sock: socket.socket

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
