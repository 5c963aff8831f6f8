"""Locks between processes, on files in the data directory."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from tinyoai.host import datadir


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Waits for the lock and holds it. Creates the file and its folder. Raises UsageError if it cannot."""
    try:
        datadir.make(path.parent)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise datadir.cannot_write(path, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
