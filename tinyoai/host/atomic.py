"""Writing what must survive a power cut.

Owns the one way in which a file is replaced: a temporary one beside it, synced, then renamed, then its folder
synced. It must not know what the files are for.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[BinaryIO]:
    """A file to write that takes another's place at the end, whole or not at all. Raises OSError.

    Until then it is `temporary`, in the same folder, which nobody else may write to.
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
    settle(path.parent)


def replace(path: Path, data: bytes) -> None:
    """Puts a file in place of another, for its owner's eyes alone, whoever does the same now. Raises OSError."""
    number, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(number)
    with replacing(path, Path(temporary)) as file:
        file.write(data)


def settle(folder: Path) -> None:
    """Makes renames in a folder last. Raises OSError."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
