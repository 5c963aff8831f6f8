"""Writing what must survive a power cut.

Owns the one way in which a file is replaced: a temporary one beside it, synced, then renamed, then its folder
synced. It must not know what the files are for.
"""

import contextlib
import os
import tempfile
from pathlib import Path


def replace(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Puts a file in place of another, whole or not at all. Raises OSError."""
    number, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(number, "wb") as file:
            file.write(data)
            os.fchmod(number, mode)
            file.flush()
            os.fsync(number)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    settle(path.parent)


def settle(folder: Path) -> None:
    """Makes renames in a folder last. Raises OSError."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
