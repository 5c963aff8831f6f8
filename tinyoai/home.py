"""The data directory: where it is, how a file in it is replaced, and how two processes take turns.

Owns the XDG rules, and that a reader, a crash or a power cut finds the old file or the new one, never half of
one. What is written is for its owner's eyes alone. It must not know what the files mean.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from tinyoai.errors import UsageError


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
    """Replaces a file, or makes it and its folder, for its owner alone. Raises UsageError, the old file intact.

    Of several processes that write the same file at once, each must hold `turn`.
    """
    new = path.with_name(path.name + ".new")
    try:
        make(path.parent)
        try:
            _replace(path, new, data)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            raise
    except OSError as error:
        raise _told(path, error) from None


def _replace(path: Path, new: Path, data: bytes) -> None:
    new.unlink(missing_ok=True)  # one that a crash left, or a link that somebody put there
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    here = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(here)  # else a power cut could undo the renaming
    finally:
        os.close(here)


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
