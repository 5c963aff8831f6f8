"""The data directory: where it is, who may read what is written there, and how two processes take turns.

Owns the XDG rules and the sentence that is said when nothing can be written there. What is written is for its
owner's eyes alone. It must not know what the files mean.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from tinyoai.errors import UsageError
from tinyoai.host import atomic


def folder(home: str) -> Path:
    """The data directory: `home` if given, else tinyoai's by the XDG rules. Raises UsageError."""
    if home:
        return Path(home)
    given = os.environ.get("XDG_DATA_HOME", "")
    if os.path.isabs(given):  # the XDG rules: a relative one counts as none
        return Path(given) / "tinyoai"
    try:
        return Path.home() / ".local" / "share" / "tinyoai"
    except RuntimeError:
        raise UsageError("this user has no home directory; name a folder with --home", exit_code=1) from None


def write(path: Path, data: bytes) -> None:
    """Replaces a file, or makes it and its folder, for its owner alone. Raises UsageError, the old file intact."""
    try:
        make(path.parent)
        atomic.replace(path, data)
    except OSError as error:
        raise _told(path, error) from None


def make(place: Path) -> None:
    """Makes a folder for its owner alone, with those above it. Raises OSError."""
    place.mkdir(parents=True, exist_ok=True, mode=0o700)


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """Waits for, and holds, the right to change what this lock file stands for. Raises UsageError."""
    try:
        make(path.parent)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _told(path, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _told(path: Path, error: OSError) -> UsageError:
    reason = error.strerror or str(error)
    return UsageError(f"{path} cannot be written: {reason}; name another folder with --home", exit_code=1)
