"""What models there are: registered ones, and those found under --models-dir.

Owns finding files, describing them (header and settings file) and telling which are missing or broken; the
registry only remembers. `refresh` and `current` touch the disk and belong in a thread; `view` is ready at any
time. It must not know which models run.
"""

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct, structs

from tinyoai import errors, gguf
from tinyoai.engine import facts
from tinyoai.models.registry import Defaults, Kind, Model, Registry, RegistryError, Shape
from tinyoai.text import chat_format

log = logging.getLogger("tinyoai.catalog")

SUFFIX = ".gguf"
MAX_NAME = 512
MAX_SHOWN = 12
"""So many names are told to who asks for one that is not there."""


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings file of a model: `llama.json` beside `llama.gguf`. All of it may be left out."""

    kind: Kind | None = None
    aliases: tuple[str, ...] = ()
    template: str = "auto"
    context: int = 0
    defaults: Defaults = Defaults()


class View(Struct, frozen=True, kw_only=True):
    """One moment's knowledge, by name. `missing` are registered, but their file is gone."""

    models: dict[str, Model]
    missing: dict[str, Model] = {}
    broken: dict[str, str] = {}
    """Why a file cannot be served."""
    aliases: dict[str, str] = {}


def describe(path: Path, name: str, *, model_type: str = "", created: int | None = None) -> Model:
    """What a model file is. Raises gguf.BadModelFile or OSError; the message may hold the path."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise gguf.BadModelFile(f"the path {str(path)!a} is not UTF-8; rename it") from None
    stamp = _stamp(path)
    status = path.stat()
    settings = _settings(path)
    common = Model(
        name=name,
        path=str(path),
        stamp=stamp,
        size=status.st_size,
        created=int(status.st_mtime) if created is None else created,
        template=settings.template,
        aliases=settings.aliases,
        own_context=settings.context,
        defaults=settings.defaults,
    )
    if gguf.kind(path) == "legacy":
        if not model_type:
            raise gguf.BadModelFile(
                f"{path} is a legacy GGML file; say which architecture it has with --model-type"
            )
        return structs.replace(
            common, kind=settings.kind or "completion", architecture=model_type, quantization="GGML"
        )
    header = gguf.read_header(path)
    facts.choose(header)
    n_head = int(header.value("attention.head_count"))
    return structs.replace(
        common,
        kind=settings.kind or _kind(header),
        architecture=header.architecture,
        quantization=header.quantization,
        parameters=header.n_params,
        context=int(header.value("context_length")),
        shape=Shape(
            n_layer=int(header.value("block_count")),
            n_embd=int(header.value("embedding_length")),
            n_head=n_head,
            n_head_kv=int(header.value("attention.head_count_kv", n_head)),
            n_ff=int(header.value("feed_forward_length")),
            n_vocab=len(header.metadata["tokenizer.ggml.tokens"]),
        ),
    )


def _kind(header: gguf.Header) -> Kind:
    """A model that says how it is talked to is for chat."""
    meta = header.metadata
    types = meta.get("tokenizer.ggml.token_type") or ()
    tokens = meta["tokenizer.ggml.tokens"]
    special = {tokens[i].decode("utf-8", "replace") for i, kind in enumerate(types) if kind == gguf.CONTROL}
    said = str(meta.get("tokenizer.chat_template", ""))
    return "chat" if said or chat_format.detect("", special) != "plain" else "completion"


def _settings(path: Path) -> Settings:
    file = path.with_suffix(".json")
    if not file.is_file():
        return Settings()
    try:
        settings = msgspec.json.decode(file.read_bytes(), type=Settings)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise gguf.BadModelFile(f"the settings file {file} is not as it should be: {error}") from None
    known = ["auto", *chat_format.NAMES]
    if settings.template not in known:
        raise gguf.BadModelFile(
            f"the settings file {file} asks for the template {settings.template!r}; there is {', '.join(known)}"
        )
    if not 0 <= settings.context <= 1 << 20:
        raise gguf.BadModelFile(f"the settings file {file} asks for a context that no model has")
    for alias in settings.aliases:
        if not _is_name(alias):
            raise gguf.BadModelFile(f"the settings file {file} has an alias that is no name: {alias[:40]!r}")
    return settings


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME and name.isprintable()


def _stamp(path: Path) -> str:
    status = path.stat()
    try:
        settings = path.with_suffix(".json").stat().st_mtime_ns
    except OSError:
        settings = 0
    return f"{status.st_size}:{status.st_mtime_ns}:{settings}"


class Catalog:
    """All known models. `default` is the name of the one that was given at start."""

    def __init__(self, default: Model, *, folder: str = "", register: bool = True) -> None:
        # as given
        self.default = default.name
        self._given = default
        self._folder = Path(folder).absolute() if folder else None
        self._register = register
        # what is known
        self._registry = Registry.in_memory()
        self._bad: dict[str, tuple[str, str, str]] = {}
        """By name: path, stamp and reason of what could not be described, so that it is not read again."""
        self._lock = threading.Lock()
        self.begun = self.ended = 0
        """How many refreshes have begun, and which was the last to end."""
        self.view = View(models={default.name: default}, aliases=_aliases([default]))

    @property
    def problem(self) -> str:
        """Why the registry is not the one on disk; empty when it is."""
        return self._registry.problem

    def open(self, home: str) -> None:
        """Opens the registry in the data directory and looks for models. Blocks; never fails."""
        with self._lock:
            self._registry = Registry.open(home)
            if self._registry.problem:
                log.warning("%s; nothing is registered beyond this run", self._registry.problem)
            if self._register:
                self._given = self._put(self._given)
        self.refresh()

    def close(self) -> None:
        """The registry's end."""
        self._registry.close()

    def lookup(self, name: str) -> Model:
        """The model of this name or alias. Raises errors.ModelNotFound saying why it is not served."""
        view = self.view
        model = view.models.get(view.aliases.get(name, name))
        if model is not None:
            return model
        if name in view.missing:
            what = f"the file of the model {name!r} is gone; put it back, or ask for another model"
        elif name in view.broken:
            what = f"the model {name!r} cannot be served: {view.broken[name]}"
        else:
            known = ", ".join(repr(known) for known in list(view.models)[:MAX_SHOWN])
            more = " and more: see GET /v1/models" if len(view.models) > MAX_SHOWN else ""
            what = f"there is no model {name!r} here; there is {known or 'none'}{more}"
        raise errors.ModelNotFound(what, param="model")

    def current(self, name: str) -> Model:
        """As lookup, but looks at the file again first. Blocks."""
        model = self.lookup(name)
        if model.path:
            try:
                same = _stamp(Path(model.path)) == model.stamp
            except OSError:
                same = False
            if not same:
                self.refresh()
        return self.lookup(name)

    def add(self, name: str, path: Path) -> int:
        """Registers a file under a name; its number, 0 where the registry is not on disk. Blocks.

        Raises gguf.BadModelFile, OSError or RegistryError.
        """
        model = self._registry.put(describe(path, name))
        self.refresh()
        return model.id

    def forget(self, name: str) -> None:
        """Takes a model off the registry. Raises errors.BadRequest where that cannot be, or RegistryError. Blocks."""
        if name == self.default:
            raise errors.BadRequest(f"{name!r} was given at start; start without it", param="id")
        if any(name == found for found, _ in self._files()):
            raise errors.BadRequest(
                f"the file of {name!r} is in the models folder; take it away from there", param="id"
            )
        self._registry.forget(name)
        self.refresh()

    def refresh(self) -> None:
        """Looks at every known file, and for new ones. Blocks."""
        with self._lock:
            self.begun += 1
            try:
                rows = {row.name: row for row in self._registry.models()}
            except RegistryError as error:
                log.warning("%s", error)
                old = self.view
                rows = {**old.models, **old.missing}
            rows[self.default] = self._given
            places = {row.name: Path(row.path) for row in rows.values()}
            for name, path in self._files():
                if name != self.default:
                    places[name] = path
            self.view = self._look(places, rows)
            self.ended = self.begun

    # -- inside ----------------------------------------------------------------------------------

    def _look(self, places: dict[str, Path], rows: dict[str, Model]) -> View:
        models: dict[str, Model] = {}
        missing: dict[str, Model] = {}
        broken: dict[str, str] = {}
        for name in sorted(places, key=lambda name: (name != self.default, name)):
            path, row = places[name], rows.get(name)
            if row is not None and not row.path:
                models[name] = row
                continue
            try:
                models[name] = self._examine(name, path, row)
            except (FileNotFoundError, NotADirectoryError):
                if row is not None:
                    missing[name] = row
            except (gguf.BadModelFile, OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                settings = path.with_suffix(".json")
                broken[name] = reason.replace(str(settings), settings.name).replace(str(path), "its file")
        return View(models=models, missing=missing, broken=broken, aliases=_aliases(list(models.values())))

    def _examine(self, name: str, path: Path, row: Model | None) -> Model:
        stamp = _stamp(path)
        if row is not None and row.stamp == stamp and row.path == str(path):
            return row
        bad = self._bad.get(name)
        if bad is not None and bad[:2] == (str(path), stamp):
            raise gguf.BadModelFile(bad[2])
        if not _is_name(name):
            raise gguf.BadModelFile("its name is too long or not of printable characters; rename the file")
        legacy = row.architecture if row is not None and row.shape is None else ""
        try:
            model = describe(path, name, model_type=legacy)
        except gguf.BadModelFile as error:
            self._bad[name] = (str(path), stamp, str(error))
            log.warning("%s cannot be served: %s", name, error)
            raise
        if name == self.default:
            self._given = structs.replace(model, id=self._given.id)
            if not self._register:
                return self._given
        return self._put(model)

    def _put(self, model: Model) -> Model:
        try:
            return self._registry.put(model)
        except RegistryError as error:
            log.warning("the model %s is not registered: %s", model.name, error)
            return model

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Every model file under --models-dir with its name: the path from there, without the suffix."""
        if self._folder is None:
            return
        for where, folders, files in os.walk(self._folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for file in sorted(files):
                if file.lower().endswith(SUFFIX) and not file.startswith("."):
                    path = Path(where, file)
                    name = path.relative_to(self._folder).as_posix()[: -len(SUFFIX)]
                    yield os.fsencode(name).decode("utf-8", "replace"), path


def _aliases(models: list[Model]) -> dict[str, str]:
    """Alias to name. A name wins over an alias, and of two equal aliases the first."""
    names = {model.name for model in models}
    found: dict[str, str] = {}
    for model in models:
        for alias in model.aliases:
            if alias not in names:
                found.setdefault(alias, model.name)
    return found
