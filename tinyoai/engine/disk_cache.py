"""The disk tier of the prefix store: states that survive the worker's end.

Nothing here raises for a bad file, a full disk or a folder that cannot be written: an entry is then a miss, and the
cause is said once.
"""

import sys
from collections.abc import Callable

from tinyoai import wire
from tinyoai.engine.contract import Adapter, Engine
from tinyoai.engine.model_key import ModelKey
from tinyoai.engine.prefix_store import Entry, PrefixStore
from tinyoai.errors import UsageError
from tinyoai.host import cache_files, subproc
from tinyoai.host.cache_files import Damaged, FileHeader, Folder, NotOurs

MAX_FILES = 1000
"""Files that are indexed, the most recently used ones."""


class DiskCache:
    """The saved states of one model."""

    def __init__(self, load: wire.Load, engine: Engine, key: ModelKey, folder: Folder) -> None:
        self._name = load.name
        self._engine = engine
        self._key = key
        self._folder = folder
        self._scanned = False
        self._said: set[str] = set()

    @property
    def known(self) -> bool:
        """The model's key is known, so that entries can be read and written."""
        return self._key.key(self._engine) is not None

    def compute_key(self) -> bool:
        """Computes a part of the model's key; False: nothing is left to do."""
        return self._key.work()

    def index(self, store: PrefixStore) -> None:
        """Adds the entries on disk to the store, once and as soon as the key is known."""
        if self._scanned:
            return
        key = self._key.key(self._engine)
        if key is None:
            return
        self._scanned = True
        for file in self._folder.files(key)[:MAX_FILES]:
            try:
                header, tokens = cache_files.read_index(file.path)
            except Damaged:
                self._folder.remove(file.path)
                continue
            except NotOurs:
                continue
            if header.key == key and 0 < len(tokens) <= self._engine.caps.n_ctx:
                adapters = tuple(Adapter(name, scale) for name, scale in header.adapters)
                store.add_file(Entry(header.scope, adapters, tokens, used_at=file.used_at, file=file.path))

    def read(self, entry: Entry) -> bytes | None:
        """The state of an entry, verified; None, and the entry has no file any more, if it is not what was written."""
        path, entry.file = entry.file, None
        if path is None or self._key.changed():
            return None
        try:
            header, tokens, state = cache_files.read_state(path)
        except Damaged:
            self._folder.remove(path)
            return None
        except (NotOurs, MemoryError):
            return None
        if header != self._header(entry) or tokens != entry.tokens:
            return None
        self._folder.touch(path)
        entry.file = path
        return state

    def write(self, entry: Entry, state: bytes, go_on: Callable[[], bool]) -> bool:
        """Writes an entry's state, which gets a file then. False: not now, or there is no room for it."""
        header = self._header(entry)
        if header is None:
            return False
        path = self._folder.new_name(header.key)
        n = len(state) + 4 * len(entry.tokens) + 4096
        try:
            self._folder.prepare()
            if not self._folder.reserve(n, entry.used_at):
                self._say(
                    "room",
                    f"no room in {self._folder.path} for a conversation of {n / 1e6:.0f} MB (--cache-disk, a tenth of "
                    f"the free space, and {cache_files.MAX_DAILY >> 30} GiB a day are the limits)",
                )
                return False
            if not cache_files.write(path, header, entry.tokens, state, entry.used_at, go_on):
                return False
        except (OSError, UsageError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            self._say("error", f"conversations cannot be kept in {self._folder.path}: {reason}")
            return False
        entry.file = path
        return True

    def remove(self, entry: Entry) -> None:
        """Deletes an entry's file."""
        if entry.file is not None:
            self._folder.remove(entry.file)
            entry.file = None

    def _header(self, entry: Entry) -> FileHeader | None:
        """The header of an entry's file; None: the key is not known."""
        key = self._key.key(self._engine)
        if key is None:
            return None
        adapters = tuple((str(adapter.name), adapter.scale) for adapter in entry.adapters)
        return FileHeader(
            key=key, model=self._name, scope=entry.scope, adapters=adapters, n_tokens=len(entry.tokens)
        )

    def _say(self, about: str, sentence: str) -> None:
        if about not in self._said:
            self._said.add(about)
            print(f"{subproc.WARNING}{sentence}", file=sys.stderr, flush=True)
