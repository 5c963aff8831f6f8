"""The registry on disk: rows, faults of its file, concurrency, and registries of version 1."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from msgspec import structs

from tinyoai.config import config_file
from tinyoai.engine.facts import HParams
from tinyoai.host import datadir
from tinyoai.models import registry
from tinyoai.models.registry import Defaults, Model, Registry, RegistryError

MODEL = Model(
    name="org/a model",
    path="/models/a.gguf",
    fingerprint="1:2:3",
    kind="completion",
    architecture="llama",
    quantization="Q8_0",
    engine="ctransformers",
    n_params=1000,
    n_ctx_train=2048,
    size=4000,
    created=1700000000,
    template="zephyr",
    aliases=("gpt-4", "ü"),
    n_ctx_override=512,
    defaults=Defaults(temperature=0.5, max_tokens=7),
    hparams=HParams(n_layer=1, n_embd=2, n_head=3, n_head_kv=4, n_ff=5, n_vocab=6),
)


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    first = Registry.open(str(tmp_path / "home"))
    assert first.problem == ""
    put = first.put(MODEL)
    assert put == structs.replace(MODEL, id=put.id)
    plain = first.put(Model(name="b", path="/b"))
    assert plain.id != put.id > 0
    first.close()
    again = Registry.open(str(tmp_path / "home"))
    assert again.models() == [put, plain]
    again.close()


def test_a_name_is_unique_and_keeps_its_id(tmp_path: Path) -> None:
    books = Registry.open(str(tmp_path))
    first = books.put(MODEL)
    books.put(Model(name="b", path="/b"))
    second = books.put(structs.replace(MODEL, path="/elsewhere.gguf"))
    assert second.id == first.id
    assert [model.path for model in books.models()] == ["/elsewhere.gguf", "/b"]
    books.delete(MODEL.name)
    assert [model.name for model in books.models()] == ["b"]
    assert books.put(MODEL).id not in (first.id, 2)  # an id is never reused
    books.close()


@pytest.mark.parametrize(
    ("given", "xdg", "expected"),
    [("/x/y", "/data", "/x/y"), ("", "/data", "/data/tinyoai"), ("", "relative", None), ("", "", None)],
)
def test_the_path_of_the_registry(
    given: str, xdg: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", xdg)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(datadir.folder(given)) == (expected or "/home/someone/.local/share/tinyoai")


# -- faults of the file --------------------------------------------------------------------------------


def foreign(path: Path) -> None:
    """Writes a database of another program."""
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE cookies (crumbs)")
    database.commit()
    database.close()


def newer(path: Path) -> None:
    """Writes the registry of a later version."""
    Registry.open(str(path.parent)).close()
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version = {registry.VERSION + 1}")
    database.close()


def without_its_table(path: Path) -> None:
    """Writes a database with our application id but without our table."""
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA application_id = {registry.APPLICATION_ID}")
    database.execute(f"PRAGMA user_version = {registry.VERSION}")
    database.execute("CREATE TABLE other (x)")
    database.commit()
    database.close()


def damaged(path: Path) -> None:
    """Overwrites the middle of a registry."""
    books = Registry.open(str(path.parent))
    for i in range(200):
        books.put(structs.replace(MODEL, name=f"m{i}"))
    books.close()
    raw = bytearray(path.read_bytes())
    raw[4096:20000] = random.Random(1).randbytes(20000 - 4096)
    path.write_bytes(raw)


def a_folder(path: Path) -> None:
    """Makes a folder in place of the file."""
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (foreign, "another program"),
        (newer, "newer tinyoai"),
        (without_its_table, "no such table"),
        (damaged, "move it away"),
        (a_folder, "unable to open"),
        (
            lambda path: path.write_bytes(b"this is no database, but long enough to be one" * 100),
            "not a database",
        ),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(3000)), "move it away"),
    ],
)
def test_a_file_that_is_not_a_registry_is_reported_and_unchanged(
    tmp_path: Path, spoil: object, words: str
) -> None:
    path = tmp_path / registry.FILE
    assert callable(spoil)
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    books = Registry.open(str(tmp_path))
    assert words in books.problem
    assert str(path) in books.problem
    assert books.put(MODEL).id == 1  # an in-memory registry replaces it
    assert len(books.models()) == 1
    books.close()
    assert before is None or path.read_bytes() == before


def test_a_home_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for home in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/tinyoai"), tmp_path / "a\0b"):
        books = Registry.open(str(home))
        assert "--home" in books.problem
        assert books.models() == []


def test_an_empty_file_is_a_new_registry(tmp_path: Path) -> None:
    # a power cut may leave an empty file behind
    (tmp_path / registry.FILE).write_bytes(b"")
    books = Registry.open(str(tmp_path))
    assert books.problem == ""
    assert books.put(MODEL).id == 1
    books.close()


def test_a_row_that_was_broken_by_hand_is_skipped(tmp_path: Path) -> None:
    books = Registry.open(str(tmp_path))
    books.put(MODEL)
    good = books.put(Model(name="b", path="/b"))
    with sqlite3.connect(tmp_path / registry.FILE) as database:
        database.execute("UPDATE models SET model = 'not json' WHERE name = ?", (MODEL.name,))
    database.close()
    assert books.models() == [good]
    books.close()


def test_a_failed_write_is_one_sentence(tmp_path: Path) -> None:
    books = Registry.open(str(tmp_path))
    with pytest.raises(RegistryError, match="registry"):
        books.put(structs.replace(MODEL, path="/\udcff.gguf"))
    assert books.put(MODEL).id > 0  # the next write succeeds
    books._db.execute("PRAGMA max_page_count = 1")  # simulates a full disk
    with pytest.raises(RegistryError, match="full"):
        for i in range(1000):
            books.put(structs.replace(MODEL, name=f"m{i}"))
    assert books.models()
    books.close()


# -- concurrency and crashes ---------------------------------------------------------------------------


_WRITER = """
import sys
from tinyoai.models.registry import Model, Registry
books = Registry.open(sys.argv[1])
assert not books.problem, books.problem
for i in range(int(sys.argv[3])):
    print(books.put(Model(name=f"{sys.argv[2]}-{i}", path="/x")).id, flush=True)
"""


def writer(home: Path, name: str, n: int) -> "subprocess.Popen[str]":
    """A process that registers models one after the other and prints each id once it is written."""
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(home), name, str(n)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)},
    )


def test_many_servers_create_and_write_one_registry(tmp_path: Path) -> None:
    processes = [writer(tmp_path / "new", f"p{i}", 10) for i in range(6)]
    said = [process.communicate(timeout=60) for process in processes]
    assert [stderr for _, stderr in said] == [""] * 6
    ids = [int(line) for stdout, _ in said for line in stdout.split()]
    assert len(ids) == len(set(ids)) == 60
    books = Registry.open(str(tmp_path / "new"))
    assert len(books.models()) == 60
    books.close()


def test_threads_share_one(tmp_path: Path) -> None:
    books = Registry.open(str(tmp_path))

    def put(i: int) -> None:
        for j in range(20):
            books.put(Model(name=f"{i}-{j}", path="/x"))
            books.models()

    threads = [threading.Thread(target=put, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(books.models()) == 80
    books.close()


def test_a_killed_writer_loses_no_committed_row(tmp_path: Path) -> None:
    n_written = 0
    for round_ in range(8):
        process = writer(tmp_path, f"r{round_}", 100_000)
        assert process.stdout is not None
        for _ in range(1 + 7 * round_):
            assert process.stdout.readline()
            n_written += 1
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        n_written += len(rest.splitlines())
        books = Registry.open(str(tmp_path))
        assert books.problem == ""
        assert len(books.models()) >= n_written
        n_written = len(books.models())
        books.close()


def test_a_torn_log_costs_the_last_writes_at_most(tmp_path: Path) -> None:
    """A power cut may leave any part of the last writes."""
    process = writer(tmp_path, "m", 30)
    assert process.wait(30) == 0
    process.communicate()
    keeper = Registry.open(str(tmp_path / "copy"))
    keeper.close()
    live = Registry.open(str(tmp_path))
    live.put(MODEL)
    live.put(Model(name="last", path="/x"))
    whole = (tmp_path / registry.FILE).read_bytes()
    log = (tmp_path / f"{registry.FILE}-wal").read_bytes()
    live.close()
    assert log
    for cut in [*range(0, len(log), 977), len(log)]:
        (tmp_path / "copy" / registry.FILE).write_bytes(whole)
        (tmp_path / "copy" / f"{registry.FILE}-wal").write_bytes(log[:cut])
        books = Registry.open(str(tmp_path / "copy"))
        assert books.problem == ""
        assert len(books.models()) >= 30
        books.close()


# -- version 1 -------------------------------------------------------------------------------------


OLD = Path(__file__).parent.parent / "fixtures" / "datadir-0.1"
"""A data directory made by tinyoai 0.1.0, with version 1 of the registry."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the old data directory."""
    return Path(shutil.copytree(OLD, tmp_path / "home"))


def test_an_old_data_directory_opens(old: Path) -> None:
    books = Registry.open(str(old))
    assert books.problem == ""
    chat, legacy = books.models()
    assert (chat.id, chat.name, chat.path, chat.kind) == (
        1,
        "tinyoai-chat",
        "/models/tinyoai-chat.gguf",
        "chat",
    )
    assert (chat.n_params, chat.n_ctx_train, chat.size, chat.created) == (3700000, 1024, 4000000, 1700000000)
    assert chat.defaults == Defaults(temperature=0.2)
    assert chat.hparams == HParams(n_layer=4, n_embd=256, n_head=4, n_head_kv=2, n_ff=640, n_vocab=2048)
    assert (legacy.id, legacy.name, legacy.architecture) == (3, "org/old", "gpt2")
    assert (legacy.aliases, legacy.n_ctx_override, legacy.template) == (("gpt-4", "ü"), 512, "zephyr")
    assert legacy.hparams is None
    assert chat.fingerprint == legacy.fingerprint == ""  # the files are described again
    books.delete("org/old")
    assert books.put(Model(name="new", path="/n")).id == 4  # the ids of deleted models are not reused
    books.close()
    again = Registry.open(str(old))
    assert [model.name for model in again.models()] == ["tinyoai-chat", "new"]
    again.close()
    assert config_file.read(old).values == {"port": "9000", "ctx_size": "512"}


def test_a_migration_that_fails_leaves_the_old_registry(old: Path) -> None:
    with sqlite3.connect(old / registry.FILE) as database:
        database.execute("CREATE TABLE models_1 (x)")  # a table with the name that the migration needs
    database.close()
    books = Registry.open(str(old))
    assert "models_1" in books.problem
    books.close()
    with sqlite3.connect(old / registry.FILE) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (1,)
        assert database.execute("SELECT count(*) FROM models").fetchone() == (2,)
        assert database.execute("SELECT stamp FROM models WHERE id = 1").fetchone() == ("1:2:3",)
    database.close()


def test_servers_that_migrate_at_the_same_time_agree(old: Path) -> None:
    processes = [writer(old, f"p{i}", 3) for i in range(4)]
    assert [process.communicate(timeout=60)[1] for process in processes] == [""] * 4
    books = Registry.open(str(old))
    assert len(books.models()) == 2 + 12
    books.close()
