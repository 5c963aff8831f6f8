"""When the worker writes sequences to disk: while it is idle, and before it ends. Never beside a request."""

from collections.abc import Callable
from pathlib import Path

from tinyoai import wire
from tinyoai.engine.contract import Engine
from tinyoai.engine.disk_cache import DiskCache
from tinyoai.engine.model_key import ModelKey
from tinyoai.engine.prefix_cache import PrefixCache
from tinyoai.engine.prefix_store import PrefixStore
from tinyoai.host.cache_files import Folder

IDLE_S = 60.0
"""Seconds without a request after which sequences are written."""
KEY_IDLE_S = 2.0
"""Seconds without a request after which the model's files are read for their digests."""


def begin(load: wire.Load) -> ModelKey | None:
    """The key of a load, to make before the model is loaded; None: nothing is kept on disk."""
    return ModelKey(load) if load.cache_dir and load.cache_disk and load.path else None


def open_tiers(
    load: wire.Load, engine: Engine, key: ModelKey | None
) -> tuple[PrefixStore | None, DiskCache | None]:
    """The store in memory and the one on disk. None: the engine saves nothing, or nothing is to be kept there."""
    if not engine.caps.saves or not (load.cache_ram or key):
        return None, None
    store = PrefixStore(load.cache_ram, goes_back=engine.caps.cuts_states)
    if key is None or key.changed():
        return store, None
    return store, DiskCache(load, engine, key, Folder(Path(load.cache_dir), load.cache_disk))


class Saving:
    """Decides by the seconds that the worker has been idle."""

    def __init__(self, prefixes: PrefixCache) -> None:
        self._prefixes = prefixes
        self._key_is_open = prefixes.on_disk
        """The model's key may not be known yet."""

    def due_in(self, idle: float) -> float | None:
        """Seconds until there is work, after `idle` seconds without a request; None: there is none."""
        if self._key_is_open:
            return max(0.0, KEY_IDLE_S - idle)
        if self._prefixes.unsaved:
            return max(0.0, IDLE_S - idle)
        return None

    def work(self, idle: float, go_on: Callable[[], bool]) -> None:
        """Does the work that is due, until `go_on` says no."""
        if self._key_is_open and idle >= KEY_IDLE_S:
            self._compute_key(go_on)
        if not self._key_is_open and idle >= IDLE_S and self._prefixes.unsaved:
            self._prefixes.save_all(go_on)

    def finish(self, go_on: Callable[[], bool]) -> None:
        """Writes what is not on disk yet, before the worker ends."""
        self._compute_key(go_on)
        if self._prefixes.unsaved:
            self._prefixes.save_all(go_on, last=True)

    def _compute_key(self, go_on: Callable[[], bool]) -> None:
        while go_on():
            if not self._prefixes.compute_key():
                self._key_is_open = False
                return
