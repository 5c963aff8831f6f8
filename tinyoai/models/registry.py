"""The registry on disk: one row for every registered model, in SQLite.

A foreign, damaged or unwritable database is named in `problem`, and one in memory takes its place, so a server
always has a registry. Safe in threads.
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
from tinyoai.engine.facts import HParams
from tinyoai.host import datadir
from tinyoai.sampling import SamplingOverrides
from tinyoai.wire import AdapterFile

FILE = "registry.db"
APPLICATION_ID = 0x746F6169
"""In the database's header, so that another program's file is recognised."""
VERSION = 2
BUSY_S = 5.0
"""Seconds to wait for another server that is writing."""

Kind = Literal["chat", "completion", "embedding", "rerank"]
DefaultSource = Literal["settings", "file", "openai"]
"""Where a request field's default comes from: the settings file, the model file, or OpenAI's API."""


class RegistryError(errors.TinyoaiError):
    """The registry cannot be read or written; one sentence says why and what to do."""


class Defaults(SamplingOverrides, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Values of the request fields that a request leaves out; the bounds are those of the requests."""

    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None


class LastLoad(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the last load of a model has shown."""

    settings: str
    """The settings that decide its memory, as a text to compare."""
    resident_bytes: int = 0
    """0: not measured."""
    n_embd_out: int = 0
    """Numbers in an embedding; 0: it cannot embed."""
    pooling: str = ""


class Model(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One registered model. Sizes are in bytes, lengths in tokens, `created` in Unix seconds."""

    id: int = 0
    """0: in no registry, since it could not be written."""
    name: str
    path: str
    """Absolute; empty for the fake engine."""
    fingerprint: str = ""
    """Changes when the file or its settings file changes: the other facts hold for this one."""
    kind: Kind = "chat"
    engine: str = ""
    """The engine that `--engine auto` uses."""
    architecture: str = ""
    quantization: str = ""
    n_params: int = 0
    n_ctx_train: int = 0
    """0: the file does not say."""
    size: int = 0
    created: int = 0
    template: str = "auto"
    aliases: tuple[str, ...] = ()
    n_ctx_override: int = 0
    """The context window of the settings file; 0: none."""
    reproducible: bool = False
    """Equal requests must get equal answers, by the settings file."""
    defaults: Defaults = Defaults()
    """Those of the settings file."""
    file_defaults: Defaults = Defaults()
    """Those of the model file itself, which apply where the settings file sets nothing."""
    adapters: tuple[AdapterFile, ...] = ()
    """LoRA adapters."""
    hparams: HParams | None = None
    """None for legacy files and the fake engine."""
    can_embed: bool = False
    """Whether it makes embeddings, by its engine or by its last load."""
    can_rank: bool = False
    """Whether it has a rank head."""
    loaded: LastLoad | None = None
    """None before the first load of this file."""

    @property
    def all_defaults(self) -> Defaults:
        """The settings file's values over those of the model file."""
        found = {name: self._default(name)[0] for name in Defaults.__struct_fields__}
        return msgspec.convert(found, Defaults)

    def default_source(self, name: str) -> DefaultSource:
        """Where a request field's default comes from: "settings", "file", or "openai" for neither."""
        return self._default(name)[1]

    def _default(self, name: str) -> tuple[float | int | None, DefaultSource]:
        if (value := getattr(self.defaults, name)) is not None:
            return value, "settings"
        value = getattr(self.file_defaults, name)
        return value, "openai" if value is None else "file"


_SCHEMA = """
CREATE TABLE models (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL
)
"""
"""`model` is the row as JSON, without id and name."""
_VERSION_1 = (
    "id, name, path, stamp, kind, architecture, quantization, parameters, context, size, created, template, aliases, "
    "own_context, defaults, shape"
)
"""The columns of version 1. The last two and the aliases are JSON."""


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
        """The registry in the data directory; if that cannot be used, one in memory with a `problem`."""
        try:
            return cls(_open(datadir.folder(home) / FILE))
        except (RegistryError, errors.UsageError) as error:
            return cls.in_memory(str(error))

    @classmethod
    def in_memory(cls, problem: str = "") -> "Registry":
        """An empty registry that lives as long as the process."""
        database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        database.execute(_SCHEMA)
        return cls(database, problem)

    def models(self) -> list[Model]:
        """All rows, in the order of their ids. Raises RegistryError."""
        with self._lock, _sqlite_errors():
            rows = self._db.execute("SELECT id, name, model FROM models ORDER BY id").fetchall()
        found = []
        for row in rows:
            # a row that was changed by hand into something else is left out
            with contextlib.suppress(msgspec.MsgspecError, UnicodeError):
                found.append(_from_row(*row))
        return found

    def put(self, model: Model) -> Model:
        """Writes a row by its name, new or in place of the old. Returns the model with its id. Raises RegistryError."""
        with self._lock, _sqlite_errors(), _transaction(self._db):
            self._db.execute(
                "INSERT INTO models (name, model) VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET model = excluded.model",
                (model.name, _to_json(model)),
            )
            (id_,) = self._db.execute("SELECT id FROM models WHERE name = ?", (model.name,)).fetchone()
        return structs.replace(model, id=id_)

    def delete(self, name: str) -> None:
        """Deletes a row; no file is touched. Raises RegistryError."""
        with self._lock, _sqlite_errors():
            self._db.execute("DELETE FROM models WHERE name = ?", (name,))

    def close(self) -> None:
        """Closes the database. No other method may be called afterwards."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.close()


def _to_json(model: Model) -> str:
    return msgspec.json.encode(structs.replace(model, id=0, name="")).decode()


def _from_row(id_: object, name: object, model: object) -> Model:
    if not isinstance(id_, int) or not isinstance(name, str) or not isinstance(model, str):
        raise msgspec.ValidationError("a row of other types")
    return structs.replace(msgspec.json.decode(model, type=Model), id=id_, name=name)


@contextlib.contextmanager
def _sqlite_errors() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, UnicodeError) as error:
        raise RegistryError(f"the registry cannot be used: {error}") from None


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    try:
        database.execute("BEGIN IMMEDIATE")
        yield
        database.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise


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

    def state() -> tuple[int, int, int]:
        tables = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        return number("application_id"), number("user_version"), tables

    application, version, tables = state()
    if application != APPLICATION_ID and (application or version or tables):
        raise RegistryError(
            f"{path} is a database of another program; move it away or name another folder with --home"
        )
    if version > VERSION:
        raise RegistryError(
            f"the registry {path} is of a newer tinyoai; update this one or name another folder with --home"
        )
    if tables:
        result = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if result != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {result}")
        columns = _VERSION_1 if version == 1 else "id, name, model"
        database.execute(f"SELECT {columns} FROM models LIMIT 1").fetchone()
    _write_ahead(database)
    # every commit is on the disk when it returns: rows are few, and a power cut may come at any time
    database.execute("PRAGMA synchronous = FULL")
    if tables and version == VERSION:
        return
    with _transaction(database):
        application, version, tables = state()
        if tables and version == 1:
            _migrate(database)
        elif not tables:  # else another server was faster
            database.execute(_SCHEMA)
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {VERSION}")


def _migrate(database: sqlite3.Connection) -> None:
    """Version 1 to 2, inside a transaction. Ids stay; rows that cannot be read are dropped, as before."""
    rows = database.execute(f"SELECT {_VERSION_1} FROM models ORDER BY id").fetchall()
    database.execute("ALTER TABLE models RENAME TO models_1")
    database.execute(_SCHEMA)
    for row in rows:
        old = dict(zip(_VERSION_1.split(", "), row, strict=True))
        # the fingerprint of version 1 is left out: the file is described again, since engines judge it now
        fields = {
            "name": "",
            "path": old["path"],
            "kind": old["kind"],
            "architecture": old["architecture"],
            "quantization": old["quantization"],
            "n_params": old["parameters"],
            "n_ctx_train": old["context"],
            "size": old["size"],
            "created": old["created"],
            "template": old["template"],
            "n_ctx_override": old["own_context"],
        }
        with contextlib.suppress(msgspec.MsgspecError, UnicodeError):
            for field, column in (("aliases", "aliases"), ("defaults", "defaults"), ("hparams", "shape")):
                fields[field] = msgspec.json.decode(str(old[column]))
            model = msgspec.convert(fields, Model)
            database.execute(
                "INSERT INTO models (id, name, model) VALUES (?, ?, ?)",
                (old["id"], old["name"], _to_json(model)),
            )
    # deleted models keep their numbers
    last = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'models_1'").fetchone()
    database.execute("DROP TABLE models_1")
    if last is not None:
        database.execute("DELETE FROM sqlite_sequence WHERE name = 'models'")
        database.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('models', ?)", last)


def _write_ahead(database: sqlite3.Connection) -> None:
    """Switches to WAL mode. SQLite does not wait for another connection that does the same, so this does."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
