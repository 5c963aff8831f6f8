"""The registry on disk: one row for every model that was ever registered, in SQLite.

Owns the database file, its schema and what can be wrong with it: a foreign, damaged or unwritable one is
told in a sentence and replaced by one in memory, so that a server always has a registry. Rows are facts
about files; it must not know how files are found or read, nor how models run. Safe in threads.
"""

import contextlib
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, structs

from tinyoai import errors
from tinyoai.host import datadir as data
from tinyoai.sampling import SamplingOverrides

FILE = "registry.db"
APPLICATION_ID = 0x746F6169
"""In the database's header, so that another program's file is never taken for ours."""
VERSION = 1
BUSY_S = 5.0
"""Seconds to wait for another server that is writing."""

Kind = Literal["chat", "completion", "embedding"]


class RegistryError(errors.TinyoaiError):
    """The registry cannot be read or written; one sentence says why and what to do."""


class Defaults(SamplingOverrides, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Values of the request fields that a request leaves out; the bounds are those of the requests."""

    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None


class Shape(Struct, frozen=True, kw_only=True):
    """The numbers that decide how much memory a model takes."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int


class Model(Struct, frozen=True, kw_only=True):
    """One registered model. Sizes are in bytes, lengths in tokens, `created` in Unix seconds."""

    id: int = 0
    """0: in no registry, since that could not be written."""
    name: str
    path: str
    """Absolute; empty for the scripted engine's."""
    stamp: str = ""
    """Changes when the file does: what was read from it is true for this stamp."""
    kind: Kind = "chat"
    architecture: str = ""
    quantization: str = ""
    parameters: int = 0
    context: int = 0
    """What the model was trained for."""
    size: int = 0
    created: int = 0
    template: str = "auto"
    aliases: tuple[str, ...] = ()
    own_context: int = 0
    """The context window to load it with where nothing else is said; 0: none of its own."""
    defaults: Defaults = Defaults()
    shape: Shape | None = None


_COLUMNS = tuple(field for field in Model.__struct_fields__ if field != "id")
_JSON = {"aliases", "defaults", "shape"}
_SCHEMA = """
CREATE TABLE models (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    path TEXT NOT NULL,
    stamp TEXT NOT NULL,
    kind TEXT NOT NULL,
    architecture TEXT NOT NULL,
    quantization TEXT NOT NULL,
    parameters INTEGER NOT NULL,
    context INTEGER NOT NULL,
    size INTEGER NOT NULL,
    created INTEGER NOT NULL,
    template TEXT NOT NULL,
    aliases TEXT NOT NULL,
    own_context INTEGER NOT NULL,
    defaults TEXT NOT NULL,
    shape TEXT NOT NULL
)
"""


def folder(home: str) -> Path:
    """The data directory, see `tinyoai.home`. Raises RegistryError."""
    try:
        return data.folder(home)
    except errors.UsageError as error:
        raise RegistryError(str(error)) from None


class Registry:
    """An open registry. `problem` says why it is not the one on disk; empty when it is."""

    def __init__(self, database: sqlite3.Connection, problem: str = "") -> None:
        self.problem = problem
        self._db = database
        self._lock = threading.Lock()
        # from Python 3.13 on, a connection that is dropped open complains
        weakref.finalize(self, database.close)

    @classmethod
    def open(cls, home: str) -> "Registry":
        """The registry in the data directory; where that cannot be had, one in memory and a `problem`."""
        try:
            return cls(_open(folder(home) / FILE))
        except RegistryError as error:
            return cls.in_memory(str(error))

    @classmethod
    def in_memory(cls, problem: str = "") -> "Registry":
        """An empty one that is gone with the process."""
        database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        database.execute(_SCHEMA)
        return cls(database, problem)

    def models(self) -> list[Model]:
        """All rows, in the order in which they came. Raises RegistryError."""
        with self._lock, _told():
            rows = self._db.execute(f"SELECT id, {', '.join(_COLUMNS)} FROM models ORDER BY id").fetchall()
        found = []
        for row in rows:
            # a row that was mended by hand into something else is left out, not fatal
            with contextlib.suppress(msgspec.MsgspecError, UnicodeError):
                found.append(_model(row))
        return found

    def put(self, model: Model) -> Model:
        """Writes a row by its name, new or in place of the old; the model with its id. Raises RegistryError."""
        values = [_column(model, field) for field in _COLUMNS]
        marks = ", ".join("?" * len(_COLUMNS))
        changes = ", ".join(f"{field} = excluded.{field}" for field in _COLUMNS if field != "name")
        with self._lock, _told():
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.execute(
                    f"INSERT INTO models ({', '.join(_COLUMNS)}) VALUES ({marks}) "
                    f"ON CONFLICT (name) DO UPDATE SET {changes}",
                    values,
                )
                (id_,) = self._db.execute("SELECT id FROM models WHERE name = ?", (model.name,)).fetchone()
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
        return structs.replace(model, id=id_)

    def forget(self, name: str) -> None:
        """Takes a row out; no file is touched. Raises RegistryError."""
        with self._lock, _told():
            self._db.execute("DELETE FROM models WHERE name = ?", (name,))

    def close(self) -> None:
        """Nothing may be asked of it afterwards."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.close()


def _column(model: Model, field: str) -> str | int:
    value = getattr(model, field)
    return msgspec.json.encode(value).decode() if field in _JSON else value


def _model(row: tuple[object, ...]) -> Model:
    values = dict(zip(("id", *_COLUMNS), row, strict=True))
    for field in _JSON:
        values[field] = msgspec.json.decode(str(values[field]))
    return msgspec.convert(values, Model)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, UnicodeError) as error:
        raise RegistryError(f"the registry could not be used: {error}") from None


# -- the file --------------------------------------------------------------------------------------


def _open(path: Path) -> sqlite3.Connection:
    """Raises RegistryError for a file that is not, or not yet, a registry of this version."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RegistryError(
            f"the data directory {path.parent} cannot be made: {reason}; name another with --home"
        ) from None
    database: sqlite3.Connection | None = None
    try:
        database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        _prepare(database, path)
    except (sqlite3.Error, RegistryError) as error:
        if database is not None:
            database.close()
        if isinstance(error, RegistryError):
            raise
        raise RegistryError(
            f"the registry {path} cannot be used ({error}); move it away and a new one is made, "
            "or name another folder with --home"
        ) from None
    return database


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    def number(pragma: str) -> int:
        return int(database.execute(f"PRAGMA {pragma}").fetchone()[0])

    def whose() -> tuple[int, int, int]:
        tables = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        return number("application_id"), number("user_version"), tables

    application, version, tables = whose()
    if application != APPLICATION_ID and (application or version or tables):
        raise RegistryError(
            f"{path} is a database of another program; move it away or name another folder with --home"
        )
    if version > VERSION:
        raise RegistryError(
            f"the registry {path} is of a newer tinyoai; update this one or name another folder with --home"
        )
    if tables:
        said = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if said != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {said}")
        database.execute(f"SELECT id, {', '.join(_COLUMNS)} FROM models LIMIT 1").fetchone()
    _write_ahead(database)
    # every commit is on the disk when it returns: rows are few, and a power cut may come at any time
    database.execute("PRAGMA synchronous = FULL")
    if not tables:
        database.execute("BEGIN IMMEDIATE")
        if not whose()[2]:  # else another server was faster
            database.execute(_SCHEMA)
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {VERSION}")
        database.execute("COMMIT")


def _write_ahead(database: sqlite3.Connection) -> None:
    """WAL mode; SQLite does not wait for another that is just doing the same, so this does."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
