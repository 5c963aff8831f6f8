"""Replaces files so that a crash or a power cut leaves the old or the new content, never a mixture.

The new content goes to a temporary file in the same folder, which is synced and renamed; then the folder is synced.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[BinaryIO]:
    """Yields `temporary` open for writing, and renames it to `path` at the end. Raises OSError.

    Both are in the same folder. If the block raises, `temporary` is removed and `path` is as before.
    """
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def replace(path: Path, data: bytes) -> None:
    """Replaces or creates a file that only its owner can read. Safe in several processes at once. Raises OSError."""
    # not tempfile: its imports take 5 ms of every start
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with replacing(path, temporary) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that renames in it survive a power cut. Raises OSError."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
