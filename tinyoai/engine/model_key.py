"""The key of a model's saved states: everything that decides what such a state means.

The digests of the model's files are computed in idle time, in chunks. They are kept with the files' sizes, times and
inodes, so that files that have not changed are known at once.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import msgspec

from tinyoai import gguf, wire
from tinyoai.engine.contract import Engine
from tinyoai.host import atomic, datadir

FORMAT = 1
"""Of the key; another number makes every earlier entry foreign."""
CHUNK = 4 << 20
"""Bytes that are read at a time."""
MAX_KNOWN = 256
"""Files whose digests are kept."""


class Identity(msgspec.Struct, frozen=True, array_like=True):
    """What changes when a file changes. Times are in nanoseconds."""

    size: int
    mtime: int
    ctime: int
    inode: int
    device: int


class _Known(msgspec.Struct, frozen=True, array_like=True):
    """A digest that was computed."""

    identity: Identity
    sha256: str


def _identity(about: os.stat_result) -> Identity:
    return Identity(about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino, about.st_dev)


def files_of(load: wire.Load) -> list[Path]:
    """The files of a load: the model's, then the adapters'."""
    return [*gguf.part_paths(Path(load.path)), *(Path(adapter.path) for adapter in load.adapters)]


class ModelKey:
    """The key of a load. Make it before the model is loaded, so that a file replaced meanwhile is noticed."""

    def __init__(self, load: wire.Load) -> None:
        self._load = load
        self._known_at = Path(load.cache_dir) / "digests.json"
        self._files = files_of(load)
        self._loaded: list[Identity] | None = self._identities()
        self._digests: list[str] | None = None
        self._number = -1
        self._hash = hashlib.sha256()
        self._done: list[str] = []
        self.failed = self._loaded is None
        """The files cannot be read, or have changed since the load."""
        self._look_up()

    def key(self, engine: Engine) -> str | None:
        """The digest; None: it is not known yet, or the files have changed since they were loaded."""
        if self._digests is None or self.changed():
            return None
        load, caps, info = self._load, engine.caps, engine.info
        scales = [(adapter.name, adapter.scale) for adapter in load.adapters]
        facts = (
            FORMAT,
            self._digests,
            scales,
            (load.cache_type_k, load.cache_type_v, load.flash_attn, load.kv, load.reproducible),
            # how positions are turned can depend on the size of the whole cache
            (caps.n_seq, caps.n_ctx, caps.n_kv, caps.align),
            (info.engine, info.engine_version, engine.state_format, info.architecture),
        )
        return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()

    def changed(self) -> bool:
        """Whether a file is no longer the one that was loaded."""
        if not self.failed and self._identities() != self._loaded:
            self.failed = True
            self.close()
        return self.failed

    def work(self) -> bool:
        """Computes a part of the digests; False: nothing is left to do."""
        if self.failed or self._digests is not None:
            return False
        try:
            if self._number < 0:
                self._number = os.open(self._files[len(self._done)], os.O_RDONLY | os.O_CLOEXEC)
                self._hash = hashlib.sha256()
            data = os.read(self._number, CHUNK)
        except OSError:
            self.failed = True
            return False
        if data:
            self._hash.update(data)
            return True
        self._done.append(self._hash.hexdigest())
        self.close()
        if len(self._done) < len(self._files):
            return True
        if not self.changed():
            self._digests = self._done
            self._remember()
        return False

    def close(self) -> None:
        """Ends the reading of a file."""
        if self._number >= 0:
            os.close(self._number)
            self._number = -1

    def _identities(self) -> list[Identity] | None:
        try:
            return [_identity(file.stat()) for file in self._files]
        except OSError:
            return None

    def _read_known(self) -> dict[str, _Known]:
        try:
            return msgspec.json.decode(self._known_at.read_bytes(), type=dict[str, _Known])
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return {}

    def _look_up(self) -> None:
        if self._loaded is None:
            return
        known = self._read_known()
        found = [known.get(os.fspath(file.absolute())) for file in self._files]
        digests = [
            entry.sha256
            for entry, now in zip(found, self._loaded, strict=True)
            if entry is not None and entry.identity == now
        ]
        if len(digests) == len(self._files):
            self._digests = digests

    def _remember(self) -> None:
        assert self._loaded is not None and self._digests is not None
        known = self._read_known()
        for file, identity, digest in zip(self._files, self._loaded, self._digests, strict=True):
            name = os.fspath(file.absolute())
            known.pop(name, None)
            known[name] = _Known(identity, digest)
        for name in list(known)[:-MAX_KNOWN]:
            del known[name]
        with contextlib.suppress(OSError):  # then it is computed again after the next load
            datadir.make(self._known_at.parent)
            atomic.replace(self._known_at, msgspec.json.encode(known))
