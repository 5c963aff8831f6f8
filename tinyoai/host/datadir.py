"""The data directory: where it is, and writing files there that only their owner can read."""

import os
from pathlib import Path

from tinyoai.errors import UsageError
from tinyoai.host import atomic


def folder(home: str) -> Path:
    """The absolute path of the data directory: `home`, or the XDG default if `home` is empty.

    Raises UsageError for a user without a home directory.
    """
    if home:
        return Path(home).absolute()
    xdg = os.environ.get("XDG_DATA_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification: ignore relative paths
        return Path(xdg) / "tinyoai"
    try:
        return Path.home() / ".local" / "share" / "tinyoai"
    except RuntimeError:
        raise UsageError(
            "this user has no home directory; choose a folder with --home", exit_code=1
        ) from None


def write(path: Path, data: bytes) -> None:
    """Replaces or creates a file, and creates its folder. Raises UsageError, and the old file is intact."""
    try:
        make(path.parent)
        atomic.replace(path, data)
    except OSError as error:
        raise cannot_write(path, error) from None


def make(path: Path) -> None:
    """Creates a folder, and its parents, for its owner alone. Raises OSError."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)


def cannot_write(path: Path, error: OSError) -> UsageError:
    """The error for a file in the data directory that cannot be written."""
    reason = error.strerror or str(error)
    return UsageError(f"cannot write {path}: {reason}; choose another folder with --home", exit_code=1)
