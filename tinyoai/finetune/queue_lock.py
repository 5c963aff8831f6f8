"""The lock on the queue of a data directory: one server at a time runs fine-tuning jobs there."""

import contextlib
import fcntl
import os
from pathlib import Path

FILE = "lock"


class QueueHeld(Exception):
    """Another process holds the queue."""

    def __init__(self, pid: str) -> None:
        super().__init__(f"the queue is held by pid {pid}")
        self.pid = pid
        """As the holder wrote it; empty if it has not yet."""


class QueueLock:
    """Holds the queue from `acquire` to `release`. The system releases it when the process dies."""

    def __init__(self) -> None:
        self._number = -1

    @property
    def held(self) -> bool:
        """True if this process holds the queue."""
        return self._number >= 0

    def acquire(self, root: Path) -> None:
        """Take the lock in a folder of jobs. Raises QueueHeld, or OSError if the file cannot be made."""
        if self.held:
            return
        number = os.open(root / FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(number, 20, 0).decode("ascii", "replace").strip()
            os.close(number)
            raise QueueHeld(pid) from None
        except OSError:
            os.close(number)
            raise
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the pid
            os.ftruncate(number, 0)
            os.pwrite(number, b"%d\n" % os.getpid(), 0)
        self._number = number

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self.held:
            os.close(self._number)
            self._number = -1
