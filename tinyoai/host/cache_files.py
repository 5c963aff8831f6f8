"""Files of saved KV states: their format, and the folder that holds them.

A file is a fixed head, a header in msgpack, the token ids, the state, and the SHA-256 of all that. Its name begins
with the first digits of its key, and its time of modification is the time of its last use. A file that is cut,
changed, foreign or a link is never read as something else: `read_index` and `read_state` raise Damaged or NotOurs.
"""

import contextlib
import hashlib
import os
import re
import stat
import struct
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from tinyoai.host import atomic, file_lock

FOLDER = "prefix-cache"
"""The folder's name in the data directory."""
MAGIC, VERSION = b"tinyoaiK", 1
DAY_S = 86_400
MAX_DAILY = 4 << 30
"""Bytes that are written in a day, at most: memory cards wear out."""
FREE_SHARE = 10
"""The folder takes at most one part in so many of the free space."""
CHUNK = 4 << 20
"""Bytes between two looks whether writing should go on."""
STALE_S = 600.0
"""Seconds after which a temporary file belongs to a process that has ended."""

_HEAD = struct.Struct("<8sIIQ")
"""Magic, version, bytes of the header, bytes of the state."""
_MAX_HEADER = 1 << 16
_MAX_TOKENS = 1 << 24
_DIGEST = 32
_SALT = 32
_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}\.kv", re.ASCII)
_TEMPORARY = ".new-"


class Damaged(Exception):
    """The file is this program's and not what was written."""


class NotOurs(Exception):
    """There is no such file, or it is a link, another user's, or of another version."""


class FileHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The facts of a saved state."""

    key: str
    """The digest of everything that decides what a state means: the model's file, its settings, the library."""
    model: str
    """The model's name, for people."""
    scope: str
    adapters: tuple[tuple[str, float], ...] = ()
    n_tokens: int


class Found(NamedTuple):
    """A file in the folder."""

    path: Path
    size: int
    used_at: float


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(FileHeader).decode


def _ids(data: bytes) -> "array[int]":
    ids = array("i")
    ids.frombytes(data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


# -- one file ----------------------------------------------------------------------------------------


def write(
    path: Path,
    header: FileHeader,
    tokens: "array[int]",
    state: bytes,
    used_at: float,
    go_on: Callable[[], bool],
) -> bool:
    """Writes a file whole or not at all; False: `go_on` said no. Raises OSError, and no part is left."""
    ids = array("i", tokens)
    if sys.byteorder == "big":
        ids.byteswap()
    packed = _encode(header)
    head = _HEAD.pack(MAGIC, VERSION, len(packed), len(state)) + packed + ids.tobytes()
    digest = hashlib.sha256(head)
    temporary = path.with_name(f"{_TEMPORARY}{os.urandom(8).hex()}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    view = memoryview(state)
    with contextlib.suppress(_Stopped), atomic.replacing(path, temporary) as file:
        file.write(head)
        for begin in range(0, len(view), CHUNK):
            if not go_on():
                raise _Stopped
            chunk = view[begin : begin + CHUNK]
            digest.update(chunk)
            file.write(chunk)
            file.flush()
            os.fdatasync(file.fileno())  # one sync of the whole file could take many seconds
        file.write(digest.digest())
        file.flush()
        os.utime(file.fileno(), (used_at, used_at))
        if not go_on():
            raise _Stopped
        return True
    return False


class _Stopped(BaseException):
    """Writing ends here. Not an Exception, as an interrupt."""


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """The descriptor and the size of a regular file of this user. Raises NotOurs."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        raise NotOurs from None
    try:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise NotOurs
        yield number, found.st_size
    except OSError:
        raise NotOurs from None
    finally:
        os.close(number)


def _take(number: int, n: int) -> bytes:
    """The next n bytes. Raises Damaged at the end of the file."""
    parts, left = [], n
    while left:
        part = os.read(number, min(left, 64 << 20))
        if not part:
            raise Damaged
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_head(number: int, size: int) -> tuple[FileHeader, bytes, bytes, int]:
    """The header, the bytes up to the token ids, the token ids, and the bytes of the state."""
    head = _take(number, _HEAD.size)
    magic, version, n_header, n_state = _HEAD.unpack(head)
    if magic != MAGIC:
        raise Damaged
    if version != VERSION:
        raise NotOurs
    if n_header > _MAX_HEADER:
        raise Damaged
    packed = _take(number, n_header)
    try:
        header = _decode(packed)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise Damaged from None
    if not 0 <= header.n_tokens <= _MAX_TOKENS:
        raise Damaged
    if size != _HEAD.size + n_header + 4 * header.n_tokens + n_state + _DIGEST:
        raise Damaged
    return header, head + packed, _take(number, 4 * header.n_tokens), n_state


def read_header(path: Path) -> FileHeader:
    """The header of a file, not verified. Raises Damaged or NotOurs."""
    with _opened(path) as (number, size):
        return _read_head(number, size)[0]


def read_index(path: Path) -> tuple[FileHeader, "array[int]"]:
    """The header and the token ids of a file, not verified. Raises Damaged or NotOurs."""
    with _opened(path) as (number, size):
        header, _, ids, _ = _read_head(number, size)
        return header, _ids(ids)


def read_state(path: Path) -> tuple[FileHeader, "array[int]", bytes]:
    """All of a file, verified by its digest. Raises Damaged or NotOurs."""
    with _opened(path) as (number, size):
        header, head, ids, n_state = _read_head(number, size)
        state = _take(number, n_state)
        digest = hashlib.sha256(head)
        digest.update(ids)
        digest.update(state)
        if digest.digest() != _take(number, _DIGEST):
            raise Damaged
        return header, _ids(ids), state


# -- the folder --------------------------------------------------------------------------------------


class _Written(msgspec.Struct, frozen=True):
    """The bytes that were written on a day, counted from 1970."""

    day: int = 0
    n_bytes: int = 0


class Folder:
    """The files of all models of a data directory. Several processes share it."""

    def __init__(self, path: Path, limit: int = 0, now: Callable[[], float] = time.time) -> None:
        """`limit` is in bytes, of all files together."""
        self.path = path
        self.limit = limit
        self._now = now

    def prepare(self) -> None:
        """Creates the folder for its owner alone. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = self.path.stat()
        if found.st_uid != os.geteuid():
            raise PermissionError(13, "it belongs to another user", str(self.path))
        if found.st_mode & 0o077:
            self.path.chmod(0o700)

    def new_name(self, key: str) -> Path:
        """A path for a new file of this key."""
        return self.path / f"{key[:16]}-{os.urandom(8).hex()}.kv"

    def files(self, key: str = "") -> list[Found]:
        """The files of a key, or all, the most recently used first. Links are left out."""
        found = []
        with contextlib.suppress(OSError), os.scandir(self.path) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name) and entry.name.startswith(key[:16]):
                    with contextlib.suppress(OSError):
                        about = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(about.st_mode):
                            found.append(Found(Path(entry.path), about.st_size, about.st_mtime))
        found.sort(key=lambda file: file.used_at, reverse=True)
        return found

    def most(self, used: int) -> int:
        """The bytes that all files may take now, of which `used` are taken. Raises OSError."""
        about = os.statvfs(self.path)
        return min(self.limit, (about.f_bavail * about.f_frsize + used) // FREE_SHARE)

    def reserve(self, n: int, used_at: float) -> bool:
        """Makes room for a file of n bytes that was last used then, and counts it as written.

        Deletes files that were used longer ago. False: it does not fit, or enough was written today. Raises OSError
        or UsageError.
        """
        with file_lock.held(self.path / "lock"):
            self._remove_stale()
            files = self.files()
            used = sum(file.size for file in files)
            most = self.most(used)
            older = sum(file.size for file in files if file.used_at < used_at)
            written = self.written()
            if n > most - (used - older) or written + n > MAX_DAILY:
                return False
            while used + n > most:
                oldest = files.pop()
                self.remove(oldest.path)
                used -= oldest.size
            count = _Written(int(self._now() // DAY_S), written + n)
            atomic.replace(self.path / "written.json", msgspec.json.encode(count))
            return True

    def written(self) -> int:
        """Bytes that were written today."""
        try:
            count = msgspec.json.decode((self.path / "written.json").read_bytes(), type=_Written)
        except (OSError, msgspec.MsgspecError):
            return 0
        return max(0, count.n_bytes) if count.day == int(self._now() // DAY_S) else 0

    def touch(self, path: Path) -> None:
        """Records that a file was used."""
        now = self._now()
        with contextlib.suppress(OSError):
            os.utime(path, (now, now), follow_symlinks=False)

    def remove(self, path: Path) -> None:
        """Deletes a file, if it is there."""
        with contextlib.suppress(OSError):
            os.unlink(path)

    def _remove_stale(self) -> None:
        """Deletes what processes left behind that ended while they wrote."""
        with contextlib.suppress(OSError), os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.startswith(_TEMPORARY):
                    with contextlib.suppress(OSError):
                        if entry.stat(follow_symlinks=False).st_ctime < time.time() - STALE_S:
                            self.remove(Path(entry.path))


def salt(folder: Path) -> bytes:
    """The random bytes that keep scopes the same after a restart. Raises OSError or UsageError."""
    path = folder / "salt"
    Folder(folder).prepare()
    with file_lock.held(folder / "lock"):
        with contextlib.suppress(OSError):
            known = path.read_bytes()
            if len(known) == _SALT:
                return known
        made = os.urandom(_SALT)
        atomic.replace(path, made)
        return made
