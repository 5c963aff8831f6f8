"""The models that can be served: registered ones, and those found under --models-dir.

It finds files, describes them by header and settings file, and says which are missing or broken. `refresh` and
`current` touch the disk and belong in a thread; `view` is ready at any time.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct, structs

from tinyoai import errors, gguf
from tinyoai.engine import facts
from tinyoai.engine.facts import HParams
from tinyoai.models import adapter_files, file_defaults, template_file
from tinyoai.models.adapter_files import AdapterSettings
from tinyoai.models.registry import Defaults, Kind, LastLoad, Model, Registry, RegistryError
from tinyoai.text import chat_format

log = logging.getLogger("tinyoai.catalog")

SUFFIX = ".gguf"
MAX_NAME = 512
MAX_SHOWN = 12
"""Names that the refusal of an unknown model lists."""


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings file of a model: `llama.json` beside `llama.gguf`. Every field is optional."""

    kind: Kind | None = None
    engine: str = facts.AUTO
    aliases: tuple[str, ...] = ()
    template: str = "auto"
    """A chat format, or the path of a Jinja file from this file's folder."""
    context: int = 0
    lora: tuple[AdapterSettings, ...] = ()
    """LoRA adapters."""
    reproducible: bool = False
    """As --reproducible, for this model."""
    defaults: Defaults = Defaults()


class View(Struct, frozen=True, kw_only=True):
    """A snapshot of all models by name. The files of `missing` ones are gone."""

    models: dict[str, Model]
    missing: dict[str, Model] = {}
    broken: dict[str, str] = {}
    """Why a file cannot be served."""
    aliases: dict[str, str] = {}


def describe(
    path: Path,
    name: str,
    *,
    model_type: str = "",
    created: int | None = None,
    engine: str = facts.AUTO,
    lora: tuple[AdapterSettings, ...] = (),
) -> Model:
    """The facts of a model file. Raises gguf.BadModelFile or OSError; the message may contain the path.

    `engine` is the one that must run it; "auto": that of the settings file, else any. `lora` are its adapters; empty:
    those of the settings file.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise gguf.BadModelFile(f"the path {str(path)!a} is not UTF-8; rename it") from None
    fingerprint = _fingerprint(path, lora)
    status = path.stat()
    settings = _settings(path)
    if engine in (facts.AUTO, "fake"):
        engine = settings.engine
    lora = lora or settings.lora
    common = Model(
        name=name,
        path=str(path),
        fingerprint=fingerprint,
        size=status.st_size,
        created=int(status.st_mtime) if created is None else created,
        template=settings.template,
        aliases=settings.aliases,
        n_ctx_override=settings.context,
        reproducible=settings.reproducible,
        defaults=settings.defaults,
    )
    if gguf.kind(path) == "legacy":
        if not model_type:
            raise gguf.BadModelFile(f"{path} is a legacy GGML file; name its architecture with --model-type")
        return structs.replace(
            common,
            kind=settings.kind or "completion",
            engine=facts.choose_legacy(str(path), engine),
            adapters=adapter_files.read(lora, path.parent, None, engine),
            architecture=model_type,
            quantization="GGML",
        )
    header = gguf.read_header(path)
    if header.role in _NO_MODELS:
        raise gguf.NotAModel(f"{path} {_NO_MODELS[header.role]}; name the model itself")
    engine = facts.choose(header, engine)
    hparams = facts.ENGINES[engine].hparams(header)
    return structs.replace(
        common,
        kind=settings.kind or _kind(header, hparams),
        engine=engine,
        size=header.file_size,
        file_defaults=file_defaults.read(header),
        can_embed=facts.ENGINES[engine].embeds and not hparams.ranks,
        can_rank=hparams.ranks,
        architecture=header.architecture,
        quantization=header.quantization,
        n_params=header.n_params,
        adapters=adapter_files.read(lora, path.parent, header, engine),
        n_ctx_train=int(header.value("context_length") or 0),
        hparams=hparams,
    )


_NO_MODELS = {
    "projector": "is a projector, which turns images or sound into a model's input",
    "adapter": "is a LoRA adapter, which changes a model",
    "matrix": "is an importance matrix, which helps to quantize a model",
}
"""By the file's role: the reason why it is none, to follow its name."""


def _kind(header: gguf.Header, hparams: HParams) -> Kind:
    """A model with a chat template, or with the control tokens of one, is for chat; an encoder for embeddings."""
    if hparams.ranks:
        return "rerank"
    if hparams.whole_rows:
        return "embedding"
    meta = header.metadata
    types = meta.get("tokenizer.ggml.token_type") or ()
    tokens = meta.get("tokenizer.ggml.tokens") or ()
    special = {tokens[i].decode("utf-8", "replace") for i, kind in enumerate(types) if kind == gguf.CONTROL}
    chat_template = str(meta.get("tokenizer.chat_template", ""))
    return "chat" if chat_template or chat_format.detect("", special) != "plain" else "completion"


def _settings_file(path: Path) -> Path:
    return path.with_name(f"{gguf.stem(path)}.json")


def _settings(path: Path) -> Settings:
    file = _settings_file(path)
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
    if settings.engine not in (facts.AUTO, *facts.MODEL_ENGINES):
        raise gguf.BadModelFile(
            f"the settings file {file} names the engine {settings.engine!r}; available: auto, "
            f"{', '.join(facts.MODEL_ENGINES)}"
        )
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


def _fingerprint(path: Path, lora: tuple[AdapterSettings, ...]) -> str:
    """Changes with the model's files, its settings file and its LoRA adapters; these are by default of that file.

    Raises OSError, or gguf.BadModelFile for parts.
    """
    known = [f"{status.st_size}:{status.st_mtime_ns}" for status in map(os.stat, gguf.existing_parts(path))]
    try:
        settings = _settings_file(path).stat().st_mtime_ns
    except OSError:
        settings = 0
    # an engine that was installed or removed since may change who runs the file
    fingerprint = f"{','.join(known)}:{settings}:{facts.installed()}"
    if settings and not lora:
        lora = adapter_files.named_in(_settings_file(path))
    return f"{fingerprint}:{adapter_files.stamp(lora, path.parent)}" if lora else fingerprint


class Catalog:
    """All known models. `default` is the name of the one that was given at start."""

    def __init__(
        self,
        default: Model,
        *,
        folder: str = "",
        register: bool = True,
        engine: str = facts.AUTO,
        lora: tuple[AdapterSettings, ...] = (),
    ) -> None:
        """`folder` is searched for models; `engine` is the one that must run them, "auto": any.

        `lora` are the adapters of the default model; empty: those of its settings file.
        """
        # settings
        self._engine = engine
        self.default = default.name
        self._given = default
        self._folder = Path(folder).absolute() if folder else None
        self._register = register
        self._lora = {default.name: lora}
        # state
        self._registry = Registry.in_memory()
        self._bad: dict[str, tuple[str, str, gguf.BadModelFile]] = {}
        """By name: path, fingerprint and error of files that cannot be served, so that they are not read again."""
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
                self._given = self._put(self._with_last_load(self._given))
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
                same = _fingerprint(Path(model.path), self._lora.get(model.name, ())) == model.fingerprint
            except (OSError, gguf.BadModelFile):
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

    def note_load(self, name: str, fingerprint: str, loaded: LastLoad) -> None:
        """Keeps what a load of a model has shown, if its file is still the same. Blocks."""
        with self._lock:
            # the view may be older than the registry, which opens while the first model loads
            row = self._given if name == self.default else self.view.models.get(name)
            if row is None or row.fingerprint != fingerprint:
                return
            if row.loaded is not None and row.loaded.settings == loaded.settings:
                most = max(row.loaded.resident_bytes, loaded.resident_bytes)
                loaded = structs.replace(loaded, resident_bytes=most)
            if row.loaded == loaded:
                return
            row = structs.replace(row, loaded=loaded)
            if row.id:
                row = self._put(row)
            if name == self.default:
                self._given = row
            self.view = structs.replace(self.view, models={**self.view.models, name: row})

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
            except gguf.NotAModel:
                continue
            except (gguf.BadModelFile, OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                settings = _settings_file(path)
                broken[name] = reason.replace(str(settings), settings.name).replace(str(path), "its file")
        return View(models=models, missing=missing, broken=broken, aliases=_aliases(list(models.values())))

    def _examine(self, name: str, path: Path, row: Model | None) -> Model:
        lora = self._lora.get(name, ())
        fingerprint = _fingerprint(path, lora)
        if row is not None and row.fingerprint == fingerprint and row.path == str(path) and self._runs(row):
            return row
        bad = self._bad.get(name)
        if bad is not None and bad[:2] == (str(path), fingerprint):
            raise type(bad[2])(str(bad[2]))
        if not _is_name(name):
            raise gguf.BadModelFile(
                "its name is too long or has characters that cannot be printed; rename the file"
            )
        legacy = row.architecture if row is not None and row.hparams is None else ""
        try:
            model = describe(path, name, model_type=legacy, engine=self._engine, lora=lora)
        except gguf.BadModelFile as error:
            self._bad[name] = (str(path), fingerprint, error)
            if not isinstance(error, gguf.NotAModel):
                log.warning("%s cannot be served: %s", name, error)
            raise
        if name == self.default:
            self._given = structs.replace(model, id=self._given.id)
            if not self._register:
                return self._given
        return self._put(model)

    def _with_last_load(self, model: Model) -> Model:
        """The model with what the registry knows of its last load, if it has not been loaded since."""
        with contextlib.suppress(RegistryError):
            for row in self._registry.models():
                if (row.name, row.path, row.fingerprint) == (model.name, model.path, model.fingerprint):
                    return structs.replace(model, loaded=model.loaded or row.loaded)
        return model

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
        """Every model under --models-dir with its name, the path from there without the suffix, and its first file."""
        if self._folder is None:
            return
        for where, folders, files in os.walk(self._folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            seen: set[Path] = set()
            for file in sorted(files):
                if file.lower().endswith(SUFFIX) and not file.startswith("."):
                    path = gguf.part_paths(Path(where, file))[0]
                    if path not in seen:
                        seen.add(path)
                        name = (path.parent / gguf.stem(path)).relative_to(self._folder).as_posix()
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
