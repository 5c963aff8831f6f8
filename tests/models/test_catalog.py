"""Models found, described, remembered, missing and broken."""

import json
import os
from pathlib import Path
from typing import Any

import gguf as reference
import pytest

from tests.engines import make
from tinyoai import errors, gguf
from tinyoai.engine import facts
from tinyoai.models import catalog as module
from tinyoai.models import file_defaults
from tinyoai.models.catalog import Catalog, describe
from tinyoai.models.registry import LastLoad, Model

DEFAULT = Model(name="default", path="")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small model file."""
    return make.llama(tmp_path_factory.mktemp("llama") / "m.gguf", n_embd=32, n_ctx=128).read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A models folder."""
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def put(path: Path, content: bytes, **settings: Any) -> Path:
    """Writes a model file, with its settings beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if settings:
        path.with_suffix(".json").write_text(json.dumps(settings))
    return path


def opened(folder: Path | str, home: Path) -> Catalog:
    """Returns a catalog after its first scan."""
    catalog = Catalog(DEFAULT, folder=str(folder), register=False)
    catalog.open(str(home))
    return catalog


def test_names_come_from_paths(folder: Path, tmp_path: Path, llama: bytes) -> None:
    for name in ("b.gguf", "org/repo/a.Q4_K_M.gguf", "org/\u00fc x.gguf"):
        put(folder / name, llama)
    for name in (".hidden.gguf", ".git/x.gguf", "half.gguf.part", "notes.txt", "org/GGUF"):
        put(folder / name, llama)
    (folder / "loop").symlink_to(folder)
    (folder / "link.gguf").symlink_to(folder / "b.gguf")
    (folder / "folder.gguf").mkdir()
    view = opened(folder, tmp_path / "home").view
    assert list(view.models) == ["default", "b", "link", "org/repo/a.Q4_K_M", "org/\u00fc x"]
    assert view.missing == view.broken == {}


def test_a_model_is_described_from_its_header(folder: Path, tmp_path: Path) -> None:
    make.llama(folder / "chat.gguf", n_layer=3, n_embd=64, n_head=4, n_ff=96, n_ctx=256)
    make.falcon(folder / "text.gguf")
    models = opened(folder, tmp_path / "home").view.models
    chat, text = models["chat"], models["text"]
    assert (chat.kind, chat.architecture, chat.quantization, chat.n_ctx_train) == (
        "chat",
        "llama",
        "Q8_0",
        256,
    )
    assert (text.kind, text.architecture, text.template) == ("completion", "falcon", "auto")
    assert chat.size == (folder / "chat.gguf").stat().st_size
    assert chat.id != text.id > 0
    assert chat.n_params == gguf.read_header(folder / "chat.gguf").n_params
    assert chat.hparams is not None
    assert (chat.hparams.n_layer, chat.hparams.n_embd, chat.hparams.n_head, chat.hparams.n_ff) == (
        3,
        64,
        4,
        96,
    )


def test_a_legacy_file_needs_its_architecture(tmp_path: Path) -> None:
    path = make.gpt2_ggml(tmp_path / "old.bin")
    with pytest.raises(gguf.BadModelFile, match="--model-type"):
        describe(path, "old")
    model = describe(path, "old", model_type="gpt2")
    assert (model.kind, model.architecture, model.hparams) == ("completion", "gpt2", None)
    given = Catalog(model)
    given.open(str(tmp_path / "home"))
    os.utime(path, ns=(1, 1))  # the next server reads it again and knows the architecture from the registry
    assert opened("", tmp_path / "home").view.models["old"].architecture == "gpt2"


def test_settings_beside_a_file(folder: Path, tmp_path: Path, llama: bytes) -> None:
    put(
        folder / "a.gguf",
        llama,
        kind="embedding",
        aliases=["gpt-4", "org/x"],
        template="zephyr",
        context=64,
        defaults={"temperature": 0.5},
    )
    catalog = opened(folder, tmp_path / "home")
    model = catalog.lookup("org/x")
    assert model is catalog.lookup("a")
    assert (model.kind, model.template, model.n_ctx_override) == ("embedding", "zephyr", 64)
    assert model.defaults.temperature == 0.5
    assert model.defaults.top_p is None
    (folder / "a.json").unlink()
    os.utime(folder / "a.gguf", ns=(1, 1))
    catalog.refresh()
    assert catalog.lookup("a").template == "auto"
    with pytest.raises(errors.ModelNotFound):
        catalog.lookup("gpt-4")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{", "is not valid"),
        ("[]", "object"),
        ('{"tempature": 1}', "tempature"),
        ('{"defaults": {"temperature": 9}}', "temperature"),
        ('{"defaults": {"seed": 1}}', "seed"),
        ('{"defaults": {"max_tokens": 0}}', "max_tokens"),
        ('{"template": "jinja"}', "'jinja' is not one of auto, chatml"),
        ('{"template": "."}', "'.' is not a file"),
        ('{"context": -5}', "context"),
        ('{"aliases": ["a\\nb"]}', "alias"),
        ('{"kind": "music"}', "music"),
    ],
)
def test_a_model_with_wrong_settings_is_listed_as_broken(
    folder: Path, tmp_path: Path, llama: bytes, settings: str, words: str
) -> None:
    put(folder / "a.gguf", llama).with_suffix(".json").write_text(settings)
    catalog = opened(folder, tmp_path / "home")
    assert "a" not in catalog.view.models
    assert words in catalog.view.broken["a"]
    assert str(folder) not in catalog.view.broken["a"], "messages to clients must not contain a folder"
    with pytest.raises(errors.ModelNotFound, match=r"settings file a\.json"):
        catalog.lookup("a")
    (folder / "a.json").write_text("{}")
    catalog.refresh()
    assert catalog.lookup("a").name == "a"


def test_a_suffix_in_capitals_is_accepted(folder: Path, tmp_path: Path, llama: bytes) -> None:
    put(folder / "OLD.GGUF", llama)
    assert opened(folder, tmp_path / "home").lookup("OLD").path.endswith("OLD.GGUF")


def test_a_broken_file_is_listed_and_served_once_it_is_complete(
    folder: Path, tmp_path: Path, llama: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    real = describe
    monkeypatch.setattr(
        module, "describe", lambda path, name, **more: (reads.append(name), real(path, name, **more))[1]
    )
    put(folder / "cut.gguf", llama[: len(llama) // 2])
    put(folder / "good.gguf", llama)
    put(folder / "page.gguf", b"<html>not found</html>")
    catalog = opened(folder, tmp_path / "home")
    assert set(catalog.view.broken) == {"cut", "page"}
    assert "cut short" in catalog.view.broken["cut"]
    assert "text file" in catalog.view.broken["page"]
    assert str(tmp_path) not in " ".join(catalog.view.broken.values())
    with pytest.raises(errors.ModelNotFound, match="'cut' cannot be served"):
        catalog.lookup("cut")
    catalog.refresh()
    assert sorted(reads) == ["cut", "good", "page"]  # no file is read twice
    put(folder / "cut.gguf", llama)
    catalog.refresh()
    assert catalog.lookup("cut").size == len(llama)


def test_a_vanished_file_is_missing_until_it_is_back(folder: Path, tmp_path: Path, llama: bytes) -> None:
    path = put(folder / "org" / "a.gguf", llama)
    catalog = opened(folder, tmp_path / "home")
    number = catalog.lookup("org/a").id
    path.rename(tmp_path / "away.gguf")
    with pytest.raises(errors.ModelNotFound, match="file of the model 'org/a' is gone"):
        catalog.current("org/a")
    assert list(catalog.view.missing) == ["org/a"]
    assert "org/a" in opened("", tmp_path / "home").view.missing  # another server knows it too
    (tmp_path / "away.gguf").rename(path)
    catalog.refresh()
    assert catalog.lookup("org/a").id == number


def test_the_registry_remembers_without_the_folder(folder: Path, tmp_path: Path, llama: bytes) -> None:
    put(folder / "a.gguf", llama, aliases=["other"])
    first = opened(folder, tmp_path / "home")
    again = opened("", tmp_path / "home")
    assert again.view == first.view
    again.forget("a")
    assert "a" not in again.view.models
    first.refresh()
    assert "a" in first.view.models  # its file is in the folder, so a scan finds it again


def test_a_changed_file_is_described_again(folder: Path, tmp_path: Path, llama: bytes) -> None:
    put(folder / "a.gguf", llama)
    catalog = opened(folder, tmp_path / "home")
    before = catalog.lookup("a")
    make.llama(folder / "a.gguf", n_embd=64, n_ctx=256)
    after = catalog.current("a")
    assert (after.id, after.name, after.n_ctx_train) == (before.id, "a", 256)


def test_names_win_over_aliases_and_the_model_option_over_both(
    folder: Path, tmp_path: Path, llama: bytes
) -> None:
    put(folder / "default.gguf", llama)
    put(folder / "a.gguf", llama, aliases=["b", "default", "x"])
    put(folder / "b.gguf", llama, aliases=["x", "y"])
    catalog = opened(folder, tmp_path / "home")
    assert catalog.lookup("default") is DEFAULT
    assert [catalog.lookup(name).name for name in ("a", "b", "x", "y")] == ["a", "b", "a", "b"]


def test_names_that_are_not_allowed(folder: Path, tmp_path: Path, llama: bytes) -> None:
    put(Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff.gguf")), llama)
    put(folder / "line\nbreak.gguf", llama)
    put(folder / ("n" * 240) / ("m" * 240) / ("o" * 100 + ".gguf"), llama)
    catalog = opened(folder, tmp_path / "home")
    assert list(catalog.view.models) == ["default"]
    assert len(catalog.view.broken) == 3
    json.dumps(list(catalog.view.broken)).encode()  # every name can be encoded
    "".join(catalog.view.broken).encode()


def test_the_error_for_an_unknown_model_lists_others(folder: Path, tmp_path: Path, llama: bytes) -> None:
    for i in range(20):
        put(folder / f"m{i:02}.gguf", llama)
    catalog = opened(folder, tmp_path / "home")
    with pytest.raises(errors.ModelNotFound) as caught:
        catalog.lookup("gpt-4")
    assert "'gpt-4'" in caught.value.message
    assert "'default', 'm00'" in caught.value.message
    assert "GET /v1/models" in caught.value.message
    assert "m19" not in caught.value.message
    assert caught.value.param == "model"


def test_a_registry_that_fails_later_does_not_lose_what_is_known(
    folder: Path, tmp_path: Path, llama: bytes
) -> None:
    put(folder / "a.gguf", llama)
    catalog = opened(folder, tmp_path / "home")
    catalog.close()
    put(folder / "b.gguf", llama)
    catalog.refresh()
    assert list(catalog.view.models) == ["default", "a", "b"]
    assert catalog.lookup("b").id == 0


def test_a_settings_file_names_a_template_beside_it(folder: Path, tmp_path: Path, llama: bytes) -> None:
    path = put(folder / "a.gguf", llama, template="own.jinja")
    catalog = opened(folder, tmp_path / "home")
    assert "names a template: 'own.jinja' is not one of" in catalog.view.broken["a"]
    (folder / "own.jinja").write_text("{{ messages[0].content }}")
    put(path, llama, template="own.jinja", context=64)
    catalog.refresh()
    assert catalog.lookup("a").template == str(folder / "own.jinja")


# -- files that belong to a model ------------------------------------------------------------------------


def split(path: Path, content: bytes, *, count: int = 3) -> list[Path]:
    """A model in several files, each with some of its tensors."""
    source = path.with_suffix(".whole")
    source.write_bytes(content)
    whole = reference.GGUFReader(source)
    tensors = whole.tensors
    paths = [path.with_name(f"{path.stem}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    for number, part in enumerate(paths):
        writer = reference.GGUFWriter(str(part), "llama")
        for field in whole.fields.values() if number == 0 else ():
            if field.name.startswith("GGUF.") or field.name == "general.architecture":
                continue
            kind = field.types[0]
            writer.add_key_value(
                field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None
            )
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    source.unlink()
    return paths


def with_llamacpp(monkeypatch: pytest.MonkeyPatch, *, there: bool = True) -> None:
    """Makes the library of llama.cpp there or not."""
    changed = facts.ENGINES["llamacpp"]._replace(installed=lambda: there)
    monkeypatch.setitem(facts.ENGINES, "llamacpp", changed)


def test_a_model_in_several_files_is_one(
    folder: Path, tmp_path: Path, llama: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_llamacpp(monkeypatch)
    (folder / "org").mkdir()
    paths = split(folder / "org" / "big.gguf", llama)
    (folder / "org" / "big.json").write_text('{"context": 64}')
    whole = put(folder / "one.gguf", llama)
    catalog = opened(folder, tmp_path / "home")
    assert list(catalog.view.models) == ["default", "one", "org/big"]
    big, one = catalog.view.models["org/big"], catalog.view.models["one"]
    assert big.path == str(paths[0])
    assert (big.engine, big.n_ctx_override) == ("llamacpp", 64)
    assert big.size == sum(path.stat().st_size for path in paths)
    assert (big.n_params, big.hparams) == (one.n_params, one.hparams)
    assert gguf.read_header(paths[0]).tensors.keys() == gguf.read_header(whole).tensors.keys()
    # a change of any file is noticed, and a missing one is named
    content = paths[1].read_bytes()
    paths[1].unlink()
    catalog.refresh()
    assert catalog.view.broken == {
        "org/big": "big-00002-of-00003.gguf is missing, one of the 3 files of the model; copy or download it"
    }
    with pytest.raises(errors.ModelNotFound, match="big-00002-of-00003"):
        catalog.current("org/big")
    paths[1].write_bytes(content)
    catalog.refresh()
    assert catalog.current("org/big").fingerprint != big.fingerprint


def test_parts_that_do_not_fit(folder: Path, llama: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with_llamacpp(monkeypatch)
    paths = split(folder / "big.gguf", llama)
    with pytest.raises(
        gguf.BadModelFile, match=r"one of 3 files of a model; name the first, big-00001-of-00003\.gguf"
    ):
        describe(paths[1], "big")
    renamed = paths[0].rename(folder / "renamed.gguf")
    with pytest.raises(gguf.BadModelFile, match="was renamed"):
        describe(renamed, "big")
    renamed.rename(paths[0])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(gguf.BadModelFile, match=r"00003-of-00003\.gguf does not belong to the model"):
        describe(paths[0], "big")
    with_llamacpp(monkeypatch, there=False)
    paths = split(folder / "big.gguf", llama)
    with pytest.raises(gguf.Unsupported, match="install it with"):
        describe(paths[0], "big")
    with pytest.raises(gguf.Unsupported, match="split into 3 files, which ctransformers cannot read"):
        describe(paths[0], "big", engine="ctransformers")


def other(path: Path, arch: str, role: str) -> Path:
    """A GGUF file that is no model."""
    writer = reference.GGUFWriter(str(path), arch)
    writer.add_string("general.type", role)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("arch", "role", "words"),
    [
        ("clip", "mmproj", "is a projector"),
        ("clip", "model", "is a projector"),
        ("llama", "adapter", "is a LoRA adapter"),
        ("llama", "imatrix", "is an importance matrix"),
    ],
)
def test_files_that_belong_to_a_model_are_not_listed(
    folder: Path, tmp_path: Path, llama: bytes, arch: str, role: str, words: str
) -> None:
    put(folder / "a.gguf", llama)
    path = other(folder / "b.gguf", arch, role)
    catalog = opened(folder, tmp_path / "home")
    for _ in range(2):  # the second look remembers the first
        assert list(catalog.view.models) == ["default", "a"]
        assert catalog.view.broken == catalog.view.missing == {}
        catalog.refresh()
    with pytest.raises(gguf.NotAModel, match=words):
        describe(path, "b")


# -- engines, defaults and loads ---------------------------------------------------------------------------


def test_a_settings_file_names_the_engine(
    folder: Path, tmp_path: Path, llama: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_llamacpp(monkeypatch)
    put(folder / "a.gguf", llama)
    put(folder / "b.gguf", llama, engine="ctransformers")
    put(folder / "c.gguf", llama, engine="vllm")
    view = opened(folder, tmp_path / "home").view
    assert (view.models["a"].engine, view.models["b"].engine) == ("llamacpp", "ctransformers")
    assert "names the engine 'vllm'; available: auto, llamacpp, ctransformers" in view.broken["c"]
    # a flag is stronger
    assert describe(folder / "b.gguf", "b", engine="llamacpp").engine == "llamacpp"


def test_the_engine_is_chosen_again_when_one_comes_or_goes(
    folder: Path, tmp_path: Path, llama: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder / "a.gguf", llama)
    for there, engine in ((False, "ctransformers"), (True, "llamacpp"), (False, "ctransformers")):
        with_llamacpp(monkeypatch, there=there)
        assert opened(folder, tmp_path / "home").view.models["a"].engine == engine


def test_the_built_in_model_stays_on_ctransformers(monkeypatch: pytest.MonkeyPatch) -> None:
    with_llamacpp(monkeypatch)
    builtin = Path(module.__file__).parents[1] / "builtin" / "tinyoai-chat.gguf"
    assert describe(builtin, "tinyoai-chat").engine == "ctransformers"


def test_defaults_of_a_model_file(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys: dict[str, Any] = {"general__sampling__top_k": 20}
    path = make.llama(folder / "a.gguf", n_embd=32, **keys)
    header = gguf.read_header(path)
    header.metadata |= {
        "general.sampling.temp": 0.6000000238418579,
        "general.sampling.top_p": 7.0,
        "general.sampling.min_p": float("nan"),
        "general.sampling.penalty_repeat": "much",
    }
    found = file_defaults.read(header)
    assert (found.temperature, found.top_k, found.top_p, found.min_p, found.repeat_penalty) == (
        0.6,
        20,
        None,
        None,
        None,
    )
    for key in ("top_p", "min_p", "penalty_repeat"):
        assert f"general.sampling.{key}" in caplog.text
    (folder / "a.json").write_text('{"defaults": {"temperature": 0.1}}')
    model = opened(folder, tmp_path / "home").view.models["a"]
    assert (model.all_defaults.temperature, model.all_defaults.top_k) == (0.1, 20)
    sources = [model.default_source(name) for name in ("temperature", "top_k", "min_p")]
    assert sources == ["settings", "file", "openai"]


def test_a_load_is_remembered_for_the_same_file(folder: Path, tmp_path: Path, llama: bytes) -> None:
    put(folder / "a.gguf", llama)
    catalog = opened(folder, tmp_path / "home")
    model = catalog.view.models["a"]
    assert model.loaded is None
    loaded = LastLoad(settings="x", resident_bytes=50, n_embd_out=32)
    catalog.note_load("a", "another file", loaded)
    catalog.note_load("b", model.fingerprint, loaded)
    assert catalog.view.models["a"].loaded is None
    catalog.note_load("a", model.fingerprint, loaded)
    catalog.note_load("a", model.fingerprint, LastLoad(settings="x", resident_bytes=40, n_embd_out=32))
    assert catalog.view.models["a"].loaded == loaded  # the most that a load with these settings took
    assert opened(folder, tmp_path / "home").view.models["a"].loaded == loaded  # also for the next server
    catalog.note_load("a", model.fingerprint, LastLoad(settings="y", resident_bytes=40))
    found = catalog.view.models["a"].loaded
    assert found is not None
    assert (found.settings, found.resident_bytes) == ("y", 40)
    os.utime(folder / "a.gguf", ns=(1, 1))
    catalog.refresh()
    assert catalog.view.models["a"].loaded is None


def test_the_given_model_keeps_its_number_and_its_last_load(tmp_path: Path, llama: bytes) -> None:
    path = put(tmp_path / "a.gguf", llama)
    loaded = LastLoad(settings="x", resident_bytes=50)
    for turn in range(3):
        model = describe(path, "a")
        catalog = Catalog(model)
        if turn == 0:  # it is loaded before the registry is open
            catalog.note_load("a", model.fingerprint, loaded)
        catalog.open(str(tmp_path / "home"))
        if turn == 1:
            catalog.note_load("a", model.fingerprint, LastLoad(settings="y", resident_bytes=60))
        found = catalog.view.models["a"]
        assert found.id == 1
        assert found.loaded is not None
        assert found.loaded.settings == ("x" if turn == 0 else "y")
        catalog.close()
