"""LoRA adapters that --lora and settings files name: read, checked, and noticed when they change."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests import adapters
from tests.engines import make
from tests.models.test_catalog import DEFAULT, opened, put, with_llamacpp
from tinyoai import errors, gguf, wire
from tinyoai.engine import facts
from tinyoai.models.adapter_files import MAX_ADAPTERS, AdapterSettings, from_flags, read
from tinyoai.models.catalog import Catalog, describe
from tinyoai.models.managed_model import estimate, last_load


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model file."""
    return make.llama(tmp_path_factory.mktemp("llama") / "m.gguf", n_embd=32, n_ctx=128)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder, with llama.cpp there."""
    with_llamacpp(monkeypatch)
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


# -- flags -------------------------------------------------------------------------------------------------


def test_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.gguf", "b=2.gguf", "c=0.5"):
        (tmp_path / name).touch()
    found = from_flags(["a.gguf", "a.gguf=0.25", "b=2.gguf", "b=2.gguf=-1", "c=0.5", f"{tmp_path}/a.gguf=0"])
    assert [(Path(each.file).name, each.scale) for each in found] == [
        ("a.gguf", 1.0),
        ("a.gguf", 0.25),
        ("b=2.gguf", 1.0),
        ("b=2.gguf", -1.0),
        ("c=0.5", 1.0),
        ("a.gguf", 0.0),
    ]
    assert all(Path(each.file).is_absolute() for each in found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gone.gguf", "gone.gguf is not a file"),
        ("gone.gguf=1", "gone.gguf is not a file"),
        ("a.gguf=much", "'much' is not a number; write FILE=SCALE"),
        (".", "is not a file"),
    ],
)
def test_wrong_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ValueError, match=words):
        from_flags([text])


# -- reading -----------------------------------------------------------------------------------------------


def test_adapters_of_a_model(llama: Path, folder: Path) -> None:
    adapters.adapter(folder / "one.gguf", llama)
    wanted = [AdapterSettings(file="one.gguf"), AdapterSettings(file="one.gguf", name="two", scale=0.5)]
    found = read(wanted, folder, gguf.read_header(llama), "llamacpp")
    size = (folder / "one.gguf").stat().st_size
    path = str(folder / "one.gguf")
    assert found == (
        wire.AdapterFile(name="one", path=path, scale=1.0, size=size),
        wire.AdapterFile(name="two", path=path, scale=0.5, size=size),
    )


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ([AdapterSettings(file="one.gguf"), AdapterSettings(file="one.gguf")], "two LoRA adapters have the name 'one'"),
        ([AdapterSettings(file="one.gguf", scale=101.0)], "has the scale 101; choose one between -100 and 100"),
        ([AdapterSettings(file="one.gguf", scale=float("nan"))], "has the scale nan"),
        ([AdapterSettings(file="one.gguf", name="x" * 101)], "needs a shorter, printable name"),
        ([AdapterSettings(file="one.gguf", name="a\nb")], "needs a shorter, printable name"),
        ([AdapterSettings(file="gone.gguf")], r"the LoRA adapter gone\.gguf is not a regular file"),
        ([AdapterSettings(file="\ud800.gguf", name="x")], "not UTF-8"),
        ([AdapterSettings(file="junk.gguf")], r"the LoRA adapter junk\.gguf"),
        ([AdapterSettings(file="m.gguf")], r"the LoRA adapter m\.gguf is not a LoRA adapter"),
        ([AdapterSettings(file="cut.gguf")], r"the LoRA adapter cut\.gguf is cut short"),
        ([AdapterSettings(file=f"{i}.gguf") for i in range(MAX_ADAPTERS + 1)], "at most 32 are possible"),
    ],
)  # fmt: skip
def test_wrong_adapters_are_refused_without_their_folder(
    llama: Path, folder: Path, wanted: list[AdapterSettings], words: str
) -> None:
    adapters.adapter(folder / "one.gguf", llama)
    (folder / "junk.gguf").write_bytes(b"junk" * 10)
    (folder / "m.gguf").write_bytes(llama.read_bytes())
    (folder / "cut.gguf").write_bytes((folder / "one.gguf").read_bytes()[:-100])
    with pytest.raises(gguf.BadModelFile, match=words) as refused:
        read(wanted, folder, gguf.read_header(llama), "llamacpp")
    assert str(folder) not in str(refused.value)


def test_other_engines_apply_none(llama: Path, folder: Path) -> None:
    adapters.adapter(folder / "one.gguf", llama)
    wanted = [AdapterSettings(file="one.gguf")]
    with pytest.raises(gguf.BadModelFile, match="only the llamacpp engine applies"):
        read(wanted, folder, gguf.read_header(llama), "ctransformers")
    with pytest.raises(gguf.BadModelFile, match="legacy GGML"):
        read(wanted, folder, None, "ctransformers")


# -- the catalog -------------------------------------------------------------------------------------------


def test_the_settings_file_names_adapters(llama: Path, folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lora": [{"file": "lora/one.gguf", "scale": 0.5}]}
    put(folder / "a.gguf", llama.read_bytes(), **settings)
    (folder / "lora").mkdir()
    file = adapters.adapter(folder / "lora" / "one.gguf", llama)
    catalog = opened(folder, tmp_path / "home")
    assert list(catalog.view.models) == ["default", "a"]  # the adapter is no model
    model = catalog.current("a")
    assert [(each.name, each.scale) for each in model.adapters] == [("one", 0.5)]
    again = opened(folder, tmp_path / "home").view.models["a"]
    assert again.adapters == model.adapters
    assert again.fingerprint == model.fingerprint
    # another file in its place makes another model
    adapters.adapter(file, llama, seed=2)
    os.utime(file, ns=(1, 1))
    assert catalog.current("a").fingerprint != model.fingerprint
    file.write_bytes(b"junk")
    catalog.refresh()
    assert "the LoRA adapter one.gguf" in catalog.view.broken["a"]
    with pytest.raises(errors.ModelNotFound, match=r"one\.gguf"):
        catalog.lookup("a")
    file.unlink()
    catalog.refresh()
    assert "one.gguf is not a regular file" in catalog.view.broken["a"]
    adapters.adapter(file, llama)
    assert catalog.view.broken
    catalog.refresh()
    assert not catalog.view.broken
    (folder / "a.json").write_text("{}")
    catalog.refresh()
    assert catalog.current("a").adapters == ()


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ("one.gguf", "array"),
        ([{"scale": 1.0}], "file"),
        ([{"file": "one.gguf", "size": 1}], "size"),
        ([{"file": "one.gguf"}, {"file": "one.gguf"}], "two LoRA adapters"),
    ],
)
def test_wrong_settings_break_the_model(
    llama: Path, folder: Path, tmp_path: Path, lora: Any, words: str
) -> None:
    put(folder / "a.gguf", llama.read_bytes(), lora=lora)
    adapters.adapter(folder / "one.gguf", llama)
    assert words in opened(folder, tmp_path / "home").view.broken["a"]


def test_flags_take_the_place_of_the_settings(llama: Path, folder: Path, tmp_path: Path) -> None:
    path = put(folder / "a.gguf", llama.read_bytes(), lora=[{"file": "one.gguf"}])
    for seed, name in enumerate(("one", "two")):
        adapters.adapter(folder / f"{name}.gguf", llama, seed=seed)
    lora = from_flags([str(folder / "two.gguf")])
    given = describe(path, "a", lora=lora)
    catalog = Catalog(given, folder=str(folder), lora=lora)
    catalog.open(str(tmp_path / "home"))
    assert [each.name for each in catalog.current("a").adapters] == ["two"]
    os.utime(folder / "two.gguf", ns=(1, 1))
    changed = catalog.current("a")
    assert changed.fingerprint != given.fingerprint
    assert [each.name for each in changed.adapters] == ["two"]
    catalog.close()
    # the next server has other flags
    later = Catalog(DEFAULT, folder=str(folder))
    later.open(str(tmp_path / "home"))
    assert [each.name for each in later.current("a").adapters] == ["one"]
    later.close()


def test_memory_counts_the_files(llama: Path, folder: Path) -> None:
    path = put(folder / "a.gguf", llama.read_bytes(), lora=[{"file": "one.gguf"}])
    file = adapters.adapter(folder / "one.gguf", llama)
    model = describe(path, "a", engine="llamacpp")

    def load(found: tuple[wire.AdapterFile, ...]) -> wire.Load:
        made = wire.Load(path=str(path), name="a", engine="llamacpp", adapters=found)
        return facts.complete(made, model.hparams, model.n_ctx_train, 1 << 30)

    with_one, without = load(model.adapters), load(())
    assert estimate(model, with_one).total - estimate(model, without).total == file.stat().st_size
    info = {
        "n_params": 1,
        "n_vocab": 1,
        "n_ctx": 1,
        "n_ctx_train": 1,
        "n_embd": 1,
        "file_size": 1,
        "bos_id": 0,
    }
    ready = wire.Ready(
        info=wire.ModelInfo(
            name="a", architecture="llama", quantization="F32", engine="llamacpp", eos_id=0, eog_ids=(), special={},
            chat_template="", add_bos=True, add_space_prefix=False, **info,
        ),
        n_slots=1, n_threads=1, version="1", resident_bytes=1 << 20,
    )  # fmt: skip
    # what a load without it took says nothing of one with it
    assert last_load(with_one, ready).settings != last_load(without, ready).settings
