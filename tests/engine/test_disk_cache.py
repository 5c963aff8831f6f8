"""The disk tier: entries of this model alone, whatever the files hold, and a process killed at every point of a save."""

import os
import shutil
import signal
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from tests.engine.test_prefix_store import talk
from tests.engine.test_scheduler import Clock
from tinyoai import wire
from tinyoai.engine import model_key
from tinyoai.engine.contract import Adapter, Copies, Engine
from tinyoai.engine.disk_cache import DiskCache
from tinyoai.engine.fake import FakeEngine
from tinyoai.engine.model_key import ModelKey
from tinyoai.engine.prefix_store import Entry, PrefixStore
from tinyoai.engine.saving import IDLE_S, KEY_IDLE_S, Saving, begin, open_tiers
from tinyoai.engine.scheduler import Scheduler
from tinyoai.host import cache_files
from tinyoai.host.cache_files import Folder


def always() -> bool:
    return True


@pytest.fixture
def load(tmp_path: Path) -> wire.Load:
    """A load whose model file is a few bytes."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return wire.Load(
        path=str(path), name="m", engine="fake", cache_ram=1 << 24, cache_disk=1 << 30,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def engine_of(**fields: Any) -> FakeEngine:
    return FakeEngine(name="m", n_slots=2, n_ctx=2048, n_batch=64, saves=True, copies=Copies.PREFIX, **fields)


def computed(load: wire.Load) -> ModelKey:
    """Returns the key of a load, computed."""
    key = ModelKey(load)
    while key.work():
        pass
    return key


def cache(load: wire.Load, engine: Engine | None = None) -> DiskCache:
    return DiskCache(
        load, engine or engine_of(), computed(load), Folder(Path(load.cache_dir), load.cache_disk)
    )


def entry(first: int = 0, n: int = 80, *, scope: str = "", adapters: tuple[Adapter, ...] = ()) -> Entry:
    return Entry(scope, adapters, array("i", range(first, first + n)), used_at=1000.0)


def indexed(load: wire.Load, engine: Engine | None = None) -> tuple[DiskCache, list[Entry]]:
    """Returns what another process finds."""
    disk, store = cache(load, engine), PrefixStore(0)
    disk.index(store)
    return disk, store.entries


def test_another_process_finds_what_was_written(load: wire.Load) -> None:
    written = entry(scope="s", adapters=(Adapter("a", 0.5),))
    assert cache(load).write(written, b"state", always)
    disk, (found,) = indexed(load)
    assert (found.tokens, found.scope, found.adapters) == (written.tokens, "s", (Adapter("a", 0.5),))
    assert disk.read(found) == b"state"
    assert found.file is not None
    assert found.file.stat().st_mtime > 1e9  # it counts as used


# -- the key -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_type_k": "q8_0"},
        {"cache_type_v": "q8_0"},
        {"flash_attn": "off"},
        {"kv": "separate"},
        {"adapters": (wire.AdapterFile(name="a", path="model.gguf"),)},
    ],
    ids=str,
)
def test_other_settings_have_other_entries(load: wire.Load, fields: dict[str, Any]) -> None:
    if "adapters" in fields:
        fields["adapters"] = (structs.replace(fields["adapters"][0], path=load.path),)
    assert cache(load).write(entry(), b"state", always)
    other = structs.replace(load, **fields)
    assert indexed(other)[1] == []
    if "adapters" in fields:  # a scale counts too
        scaled = structs.replace(other, adapters=(structs.replace(other.adapters[0], scale=0.5),))
        assert computed(scaled).key(engine_of()) != computed(other).key(engine_of())
    assert len(indexed(load)[1]) == 1


def test_another_engine_has_other_entries(load: wire.Load) -> None:
    key = computed(load)
    keys = {key.key(engine_of())}
    for caps in ({"n_kv": 4000}, {"n_seq": 3}, {"n_ctx": 1024}):
        engine = engine_of()
        engine.caps = structs.replace(engine.caps, **caps)
        keys.add(key.key(engine))
    engine = engine_of()
    engine.state_format = "another"
    keys.add(key.key(engine))
    for fields in ({"architecture": "x"}, {"engine_version": "2"}, {"engine": "x"}):
        engine = engine_of()
        engine.info = structs.replace(engine.info, **fields)
        keys.add(key.key(engine))
    assert len(keys) == 8


def test_another_content_of_the_file_has_other_entries(load: wire.Load) -> None:
    assert cache(load).write(entry(), b"state", always)
    Path(load.path).write_bytes(b"WEIGHTS")
    assert indexed(load)[1] == []
    Path(load.path).write_bytes(b"weights")
    assert len(indexed(load)[1]) == 1


def test_an_unchanged_file_is_known_at_once_and_a_changed_one_is_not(load: wire.Load) -> None:
    computed(load)
    again = ModelKey(load)
    assert again.key(engine_of()) is not None
    assert not again.work()
    Path(load.path).write_bytes(b"WEIGHTS")
    assert again.key(engine_of()) is None  # it is no longer what was loaded
    changed = ModelKey(load)
    assert changed.key(engine_of()) is None
    for damaged in (b"", b"[]", b'{"x": 1}', b"\xff"):
        (Path(load.cache_dir) / "digests.json").write_bytes(damaged)
        assert ModelKey(load).key(engine_of()) is None


def test_a_file_that_changes_while_it_is_read_has_no_key(
    load: wire.Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_key, "CHUNK", 3)
    key = ModelKey(load)
    assert key.work()
    Path(load.path).write_bytes(b"WEIGHTS")
    while key.work():
        pass
    assert key.key(engine_of()) is None
    assert not (Path(load.cache_dir) / "digests.json").exists()
    gone = ModelKey(structs.replace(load, path=f"{load.path}x"))
    assert gone.failed
    assert not gone.work()


# -- files that are not what was written -----------------------------------------------------------------


def test_nothing_is_read_or_written_until_the_key_is_known(load: wire.Load) -> None:
    assert cache(load).write(entry(), b"state", always)
    (Path(load.cache_dir) / "digests.json").unlink()
    disk = DiskCache(load, engine_of(), ModelKey(load), Folder(Path(load.cache_dir), load.cache_disk))
    store = PrefixStore(0)
    disk.index(store)
    assert store.entries == []
    assert not disk.write(entry(500), b"x", always)
    while disk.compute_key():
        pass
    disk.index(store)
    assert len(store.entries) == 1


def test_swapped_cut_damaged_and_linked_files_are_misses(load: wire.Load, tmp_path: Path) -> None:
    first = cache(load)
    for i in range(5):
        assert first.write(entry(1000 * i), f"state {i}".encode() * 100, always)
    disk, found = indexed(load)
    by_start = {e.tokens[0] // 1000: e for e in found}
    files = {i: e.file for i, e in by_start.items()}
    assert all(files.values())
    swapped, whole = files[0], files[1]
    assert swapped is not None
    assert whole is not None
    shutil.copy(whole, tmp_path / "x")
    os.replace(swapped, whole)  # 0 under the name of 1
    os.replace(tmp_path / "x", swapped)
    assert disk.read(by_start[0]) is None
    assert disk.read(by_start[1]) is None
    cut, changed, linked = files[2], files[3], files[4]
    assert cut is not None
    assert changed is not None
    assert linked is not None
    os.truncate(cut, 300)
    content = bytearray(changed.read_bytes())
    content[-50] ^= 1
    changed.write_bytes(content)
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    for i in (2, 3, 4):
        assert disk.read(by_start[i]) is None
        assert by_start[i].file is None
    assert not cut.exists()  # ours, and damaged
    assert not changed.exists()
    assert (tmp_path / "elsewhere").exists()
    _, left = indexed(load)
    assert sorted(e.tokens[0] for e in left) == [0, 1000]  # whole files under other names serve


def test_damage_in_the_index_is_removed_at_start(load: wire.Load) -> None:
    assert cache(load).write(entry(), b"state", always)
    (found,) = Folder(Path(load.cache_dir)).files()
    found.path.write_bytes(b"tinyoaiK")
    assert indexed(load)[1] == []
    assert not found.path.exists()


def test_a_sequence_longer_than_the_context_window_is_left_out(load: wire.Load) -> None:
    assert cache(load).write(entry(n=2049), b"state", always)
    assert indexed(load)[1] == []


@pytest.mark.parametrize("place", ["/dev/null/x", "limit"])
def test_what_cannot_be_kept_is_said_once(
    load: wire.Load, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = structs.replace(load, cache_disk=10)
    folder = Folder(Path(load.cache_dir), 10) if place == "limit" else Folder(Path(place), 1 << 30)
    disk = DiskCache(limited, engine_of(), computed(load), folder)
    for i in range(3):
        assert not disk.write(entry(1000 * i), b"state", always)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: ")


# -- with the scheduler --------------------------------------------------------------------------------


def worker(load: wire.Load) -> tuple[Scheduler, FakeEngine]:
    """Returns the scheduler of a new process for a load."""
    engine = engine_of()
    store, disk = open_tiers(load, engine, begin(load))
    return Scheduler(engine, n_queue=8, clock=Clock(), store=store, disk=disk), engine


def long(letter: str) -> list[tuple[str, str]]:
    return [("user", letter * 300)]


def save(s: Scheduler) -> None:
    saving = Saving(s.prefixes)
    assert saving.due_in(0.0) == KEY_IDLE_S
    saving.work(KEY_IDLE_S, always)
    assert saving.due_in(0.0) == IDLE_S
    saving.work(IDLE_S - 1.0, always)
    assert Folder(Path("/nonexistent")).files() == []
    assert s.prefixes.unsaved
    saving.work(IDLE_S, always)
    assert saving.due_in(0.0) is None


def test_conversations_in_slots_and_in_memory_survive(load: wire.Load) -> None:
    s, engine = worker(load)
    for letter in "abcd":  # two of them left their slots
        talk(s, engine, long(letter), scope="s")
    save(s)
    assert len(Folder(Path(load.cache_dir)).files()) == 4
    s, engine = worker(load)
    for letter in "abcd":
        answer, accepted, _ = talk(s, engine, long(letter), scope="s")
        assert (answer, accepted.n_cached > 300) == (letter * 300, True)
    assert talk(s, engine, long("a"), scope="other")[1].n_cached == 0


def test_a_longer_conversation_takes_the_place_of_its_beginning(load: wire.Load) -> None:
    s, engine = worker(load)
    answer, _, _ = talk(s, engine, long("a"))
    save(s)
    talk(s, engine, [*long("a"), ("assistant", answer), ("user", "b" * 100)])
    Saving(s.prefixes).finish(always)
    assert len(Folder(Path(load.cache_dir)).files()) == 1
    written = Folder(Path(load.cache_dir)).written()
    Saving(s.prefixes).finish(always)
    assert Folder(Path(load.cache_dir)).written() == written  # nothing is written twice


def test_a_request_ends_the_writing(load: wire.Load) -> None:
    s, engine = worker(load)
    for letter in "abcd":
        talk(s, engine, long(letter))
    saving = Saving(s.prefixes)
    saving.work(KEY_IDLE_S, always)
    answers = iter([True] * 6 + [False] * 100)
    saving.work(IDLE_S, lambda: next(answers))
    n = len(Folder(Path(load.cache_dir)).files())
    assert 0 < n < 4
    assert saving.due_in(10.0) == IDLE_S - 10.0
    saving.work(IDLE_S, always)
    assert len(Folder(Path(load.cache_dir)).files()) == 4


def test_a_damaged_file_is_computed_again_without_an_error(load: wire.Load) -> None:
    s, engine = worker(load)
    talk(s, engine, long("a"))
    save(s)
    for file in Folder(Path(load.cache_dir)).files():
        content = bytearray(file.path.read_bytes())
        content[-40] ^= 255
        file.path.write_bytes(content)
    s, engine = worker(load)
    answer, accepted, _ = talk(s, engine, long("a"))
    assert (answer, accepted.n_cached) == ("a" * 300, 0)


def test_without_a_disk_or_memory_there_is_no_tier(load: wire.Load) -> None:
    nothing = structs.replace(load, cache_ram=0, cache_disk=0)
    assert open_tiers(nothing, engine_of(), begin(nothing)) == (None, None)
    memory_alone = structs.replace(load, cache_disk=0)
    store, disk = open_tiers(memory_alone, engine_of(), begin(memory_alone))
    assert (store is not None, disk) == (True, None)
    assert open_tiers(load, FakeEngine(name="m"), begin(load)) == (None, None)
    disk_alone = structs.replace(load, cache_ram=0)
    s, engine = worker(disk_alone)
    talk(s, engine, long("a"))
    save(s)
    s, engine = worker(disk_alone)
    assert talk(s, engine, long("a"))[1].n_cached > 300


# -- a process that is killed ----------------------------------------------------------------------------


def _killed_at(point: int, s: Scheduler) -> bool:
    """Saves in a child process that kills itself at its n-th call of a function. Returns whether it was killed."""
    child = os.fork()
    if child == 0:
        n = 0

        def count(frame: Any, event: str, arg: Any) -> None:
            nonlocal n
            if event in ("call", "c_call"):
                n += 1
                if n == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        Saving(s.prefixes).finish(always)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_process_killed_at_any_point_of_a_save_leaves_nothing_wrong(
    load: wire.Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_files, "CHUNK", 500)
    s, engine = worker(load)
    answer, _, _ = talk(s, engine, long("a"))
    save(s)
    before = tmp_path / "before"
    shutil.copytree(load.cache_dir, before, copy_function=shutil.copy2)
    longer = [*long("a"), ("assistant", answer), ("user", "b" * 100)]
    talk(s, engine, longer)
    talk(s, engine, long("c"))
    n_points, found_long, found_other, point = 0, set[int](), 0, 1
    while True:
        shutil.rmtree(load.cache_dir)
        shutil.copytree(before, load.cache_dir, copy_function=shutil.copy2)
        killed = _killed_at(point, s)
        disk, entries = indexed(load)
        reader = engine_of()
        for e in entries:
            state = disk.read(e)
            assert state is not None, point  # every file in the index is whole
            assert reader.load(0, state)
            assert reader._tokens[0] == e.tokens.tolist(), point
        again, other = worker(load)
        text, accepted, _ = talk(again, other, longer)
        assert text == "b" * 100
        assert accepted.n_cached > 300, point  # the old or the new state is there
        found_long.add(accepted.n_cached)
        found_other += talk(again, other, long("c"))[1].n_cached > 300
        n_points += 1
        if not killed:
            break
        point += 1 + point // 20
    assert n_points > 50
    assert len(found_long) == 2
    assert 0 < found_other < n_points
