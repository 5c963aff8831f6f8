"""The models that can be served: registered ones, and those found under --models-dir.

It finds files, describes them by header and settings file, and says which are missing or broken. `refresh` and
`current` touch the disk and belong in a thread; `view` is ready at any time.
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
from tinyoai.models import template_file
from tinyoai.models.registry import Defaults, Kind, Model, Registry, RegistryError
from tinyoai.text import chat_format

log = logging.getLogger("tinyoai.catalog")

SUFFIX = ".gguf"
MAX_NAME = 512
MAX_SHOWN = 12
"""Names that the refusal of an unknown model lists."""


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings file of a model: `llama.json` beside `llama.gguf`. Every field is optional."""

    kind: Kind | None = None
    aliases: tuple[str, ...] = ()
    template: str = "auto"
    """A chat format, or the path of a Jinja file from this file's folder."""
    context: int = 0
    defaults: Defaults = Defaults()


class View(Struct, frozen=True, kw_only=True):
    """A snapshot of all models by name. The files of `missing` ones are gone."""

    models: dict[str, Model]
    missing: dict[str, Model] = {}
    broken: dict[str, str] = {}
    """Why a file cannot be served."""
    aliases: dict[str, str] = {}


def describe(
    path: Path, name: str, *, model_type: str = "", created: int | None = None, engine: str = facts.AUTO
) -> Model:
    """The facts of a model file. Raises gguf.BadModelFile or OSError; the message may contain the path.

    `engine` is the one that must run it; "auto": any.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise gguf.BadModelFile(f"the path {str(path)!a} is not UTF-8; rename it") from None
    fingerprint = _fingerprint(path)
    status = path.stat()
    settings = _settings(path)
    common = Model(
        name=name,
        path=str(path),
        fingerprint=fingerprint,
        size=status.st_size,
        created=int(status.st_mtime) if created is None else created,
        template=settings.template,
        aliases=settings.aliases,
        n_ctx_override=settings.context,
        defaults=settings.defaults,
    )
    if gguf.kind(path) == "legacy":
        if not model_type:
            raise gguf.BadModelFile(f"{path} is a legacy GGML file; name its architecture with --model-type")
        return structs.replace(
            common,
            kind=settings.kind or "completion",
            engine=facts.choose_legacy(str(path), facts.AUTO if engine == "fake" else engine),
            architecture=model_type,
            quantization="GGML",
        )
    header = gguf.read_header(path)
    engine = facts.choose(header, facts.AUTO if engine == "fake" else engine)
    return structs.replace(
        common,
        kind=settings.kind or _kind(header),
        engine=engine,
        architecture=header.architecture,
        quantization=header.quantization,
        n_params=header.n_params,
        n_ctx_train=int(header.value("context_length") or 0),
        hparams=facts.ENGINES[engine].hparams(header),
    )


def _kind(header: gguf.Header) -> Kind:
    """A model with a chat template, or with the control tokens of one, is for chat."""
    meta = header.metadata
    types = meta.get("tokenizer.ggml.token_type") or ()
    tokens = meta.get("tokenizer.ggml.tokens") or ()
    special = {tokens[i].decode("utf-8", "replace") for i, kind in enumerate(types) if kind == gguf.CONTROL}
    chat_template = str(meta.get("tokenizer.chat_template", ""))
    return "chat" if chat_template or chat_format.detect("", special) != "plain" else "completion"


def _settings(path: Path) -> Settings:
    file = path.with_suffix(".json")
    if not file.is_file():
        return Settings()
    try:
        settings = msgspec.json.decode(file.read_bytes(), type=Settings)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise gguf.BadModelFile(f"the settings file {file} is not valid: {error}") from None
    if template_file.is_file(settings.template):
        try:
            template_file.read(settings.template, str(path.parent))
        except template_file.BadTemplateFile as error:
            raise gguf.BadModelFile(f"the settings file {file} names a template: {error}") from None
        settings = structs.replace(settings, template=os.path.abspath(path.parent / settings.template))
    if not 0 <= settings.context <= 1 << 20:
        raise gguf.BadModelFile(f"the settings file {file} has a context outside 0 to 1048576")
    for alias in settings.aliases:
        if not _is_name(alias):
            raise gguf.BadModelFile(
                f"the settings file {file} has an alias that is not a valid name: {alias[:40]!r}"
            )
    return settings


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME and name.isprintable()


def _fingerprint(path: Path) -> str:
    status = path.stat()
    try:
        settings = path.with_suffix(".json").stat().st_mtime_ns
    except OSError:
        settings = 0
    return f"{status.st_size}:{status.st_mtime_ns}:{settings}"


class Catalog:
    """All known models. `default` is the name of the one that was given at start."""

    def __init__(
        self, default: Model, *, folder: str = "", register: bool = True, engine: str = facts.AUTO
    ) -> None:
        """`folder` is searched for models; `engine` is the one that must run them, "auto": any."""
        # settings
        self._engine = engine
        self.default = default.name
        self._given = default
        self._folder = Path(folder).absolute() if folder else None
        self._register = register
        # state
        self._registry = Registry.in_memory()
        self._bad: dict[str, tuple[str, str, str]] = {}
        """By name: path, fingerprint and reason of files that cannot be served, so that they are not read again."""
        self._lock = threading.Lock()
        self.begun = self.ended = 0
        """Counts of refreshes: begun ones, and the last that ended."""
        self.view = View(models={default.name: default}, aliases=_aliases([default]))

    @property
    def problem(self) -> str:
        """Why the registry is not the one on disk; empty when it is."""
        return self._registry.problem

    def open(self, home: str) -> None:
        """Opens the registry in the data directory and looks for models. Blocks. Does not raise."""
        with self._lock:
            self._registry = Registry.open(home)
            if self._registry.problem:
                log.warning("%s; nothing is registered beyond this run", self._registry.problem)
            if self._register:
                self._given = self._put(self._given)
        self.refresh()

    def close(self) -> None:
        """Closes the registry."""
        self._registry.close()

    def lookup(self, name: str) -> Model:
        """The model of a name or alias. Raises errors.ModelNotFound with the reason."""
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
            more = " and more, see GET /v1/models" if len(view.models) > MAX_SHOWN else ""
            what = f"model {name!r} not found; available: {known or 'none'}{more}"
        raise errors.ModelNotFound(what, param="model")

    def current(self, name: str) -> Model:
        """As lookup, after a look at the file. Blocks."""
        model = self.lookup(name)
        if model.path:
            try:
                same = _fingerprint(Path(model.path)) == model.fingerprint
            except OSError:
                same = False
            if not same:
                self.refresh()
        return self.lookup(name)

    def add(self, name: str, path: Path) -> int:
        """Registers a file under a name. Returns its id; 0 if the registry is not on disk. Blocks.

        Raises gguf.BadModelFile, OSError or RegistryError.
        """
        model = self._registry.put(describe(path, name, engine=self._engine))
        self.refresh()
        return model.id

    def forget(self, name: str) -> None:
        """Removes a model from the registry. Blocks. Raises errors.BadRequest or RegistryError."""
        if name == self.default:
            raise errors.BadRequest(f"{name!r} was given at start; restart without it", param="id")
        if any(name == found for found, _ in self._files()):
            raise errors.BadRequest(
                f"the file of {name!r} is in the models folder; move it out of there", param="id"
            )
        self._registry.delete(name)
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
        fingerprint = _fingerprint(path)
        if row is not None and row.fingerprint == fingerprint and row.path == str(path) and self._runs(row):
            return row
        bad = self._bad.get(name)
        if bad is not None and bad[:2] == (str(path), fingerprint):
            raise gguf.BadModelFile(bad[2])
        if not _is_name(name):
            raise gguf.BadModelFile(
                "its name is too long or has characters that cannot be printed; rename the file"
            )
        legacy = row.architecture if row is not None and row.hparams is None else ""
        try:
            model = describe(path, name, model_type=legacy, engine=self._engine)
        except gguf.BadModelFile as error:
            self._bad[name] = (str(path), fingerprint, str(error))
            log.warning("%s cannot be served: %s", name, error)
            raise
        if name == self.default:
            self._given = structs.replace(model, id=self._given.id)
            if not self._register:
                return self._given
        return self._put(model)

    def _runs(self, row: Model) -> bool:
        """Whether the engine of a stored row may still be used."""
        return row.engine in facts.ENGINES and self._engine in (facts.AUTO, "fake", row.engine)

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
