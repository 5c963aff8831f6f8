"""Files of saved states: what is written is read, and nothing else; limits of the folder."""

import contextlib
import hashlib
import json
import os
import random
import resource
import stat
import struct
import time
from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tinyoai.host import cache_files
from tinyoai.host.cache_files import Damaged, FileHeader, Folder, NotOurs

KEY = "0123456789abcdef" * 4
TOKENS = array("i", range(70))
STATE = random.Random(1).randbytes(5000)
HEADER = FileHeader(key=KEY, model="m", scope="s", adapters=(("a", 0.5),), n_tokens=len(TOKENS))
HEAD = struct.Struct("<8sIIQ")


def write(path: Path, **changes: Any) -> Path:
    """Writes a file of the state above; `changes` are arguments of `cache_files.write`."""
    arguments: dict[str, Any] = {
        "header": HEADER, "tokens": TOKENS, "state": STATE, "used_at": 1e9, "go_on": lambda: True,
    } | changes  # fmt: skip
    assert cache_files.write(path, **arguments)
    return path


def name(folder: Path, n: int = 0, key: str = KEY) -> Path:
    return folder / f"{key[:16]}-{n:016x}.kv"


def outcome(path: Path) -> str:
    """Returns "same" if a file reads as it was written, or the name of the refusal."""
    try:
        header, tokens, state = cache_files.read_state(path)
    except (Damaged, NotOurs) as error:
        return type(error).__name__
    assert (header, tokens, state) == (HEADER, TOKENS, STATE)
    return "same"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write(name(tmp_path))
    assert outcome(path) == "same"
    assert cache_files.read_header(path) == HEADER
    assert cache_files.read_index(path) == (HEADER, TOKENS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_mtime == 1e9
    assert list(tmp_path.iterdir()) == [path]


def test_every_cut_is_damage(tmp_path: Path) -> None:
    path = write(name(tmp_path))
    whole = path.read_bytes()
    for n in [*range(400), *range(400, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:n])
        assert outcome(path) == "Damaged", n
    path.write_bytes(whole + b"\0")
    assert outcome(path) == "Damaged"


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = write(name(tmp_path))
    whole = path.read_bytes()
    draw = random.Random(2)
    for at in [*range(300), *draw.sample(range(len(whole)), 300)]:
        changed = bytearray(whole)
        changed[at] ^= draw.randrange(1, 256)
        path.write_bytes(changed)
        assert outcome(path) in ("Damaged", "NotOurs"), at
        with contextlib.suppress(
            Damaged, NotOurs
        ):  # the index is not verified, and reading it never fails otherwise
            cache_files.read_index(path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"magic": b"tinyoaiX"}, "Damaged"),
        ({"version": 0}, "NotOurs"),
        ({"version": 2}, "NotOurs"),
        ({"n_header": 0}, "Damaged"),
        ({"n_header": 1}, "Damaged"),
        ({"n_header": 1 << 31}, "Damaged"),
        ({"n_state": 0}, "Damaged"),
        ({"n_state": len(STATE) - 1}, "Damaged"),
        ({"n_state": 1 << 63}, "Damaged"),
        ({"header": b""}, "Damaged"),
        ({"header": b"\xc1"}, "Damaged"),
        ({"header": msgspec.msgpack.encode(["x"])}, "Damaged"),
        ({"fields": {"n_tokens": -1}}, "Damaged"),
        ({"fields": {"n_tokens": 1 << 40}}, "Damaged"),
        ({"fields": {"n_tokens": 69}}, "Damaged"),
        ({"fields": {"key": 5}}, "Damaged"),
        ({"fields": {"scope": None}}, "Damaged"),
        ({"fields": {"adapters": [["a"]]}}, "Damaged"),
        ({"fields": {"model": b"\xff"}}, "Damaged"),
        ({"fields": {"more": 1}}, "Damaged"),
    ],
    ids=str,
)
def test_every_field_of_a_forged_head(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    """The digest is right, so that the field alone decides."""
    fields = msgspec.to_builtins(HEADER) | changes.pop("fields", {})
    packed = changes.pop("header", msgspec.msgpack.encode(fields))
    head = {"magic": b"tinyoaiK", "version": 1, "n_header": len(packed), "n_state": len(STATE)} | changes
    content = HEAD.pack(*head.values()) + packed + TOKENS.tobytes() + STATE
    path = name(tmp_path)
    path.write_bytes(content + hashlib.sha256(content).digest())
    assert outcome(path) == expected


def test_links_and_other_things_than_files_are_not_ours(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere")
    link = name(tmp_path)
    link.symlink_to(elsewhere)
    fifo = name(tmp_path, 1)
    os.mkfifo(fifo)
    folder = name(tmp_path, 2)
    folder.mkdir()
    for path in (link, fifo, folder, name(tmp_path, 3), tmp_path / "nowhere" / "x"):
        assert outcome(path) == "NotOurs"
    assert Folder(tmp_path).files() == []
    assert elsewhere.exists()


def test_writing_ends_when_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_files, "CHUNK", 1000)
    for n in range(6):
        answers = iter([True] * n + [False] * 10)
        assert not cache_files.write(name(tmp_path), HEADER, TOKENS, STATE, 1.0, lambda a=answers: next(a))
        assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_grow_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write(name(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


# -- the folder --------------------------------------------------------------------------------------


def folder(tmp_path: Path, limit: int = 10_000, now: float = 1e6) -> Folder:
    found = Folder(tmp_path / "cache", limit, lambda: now)
    found.prepare()
    return found


def test_a_folder_is_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    path.mkdir(parents=True, mode=0o755)
    Folder(path).prepare()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    with pytest.raises(OSError, match="directory"):
        Folder(Path("/dev/null/x")).prepare()


def test_the_least_recently_used_files_make_room(tmp_path: Path) -> None:
    cache = folder(tmp_path, limit=12_000)
    paths = [write(name(cache.path, n), used_at=100.0 + n) for n in range(2)]
    assert [file.path for file in cache.files()] == paths[::-1]
    assert cache.reserve(5000, 300.0)
    assert [file.path for file in cache.files()] == [paths[1]]
    assert not cache.reserve(12_001, 400.0)  # one that never fits removes nothing
    assert not cache.reserve(11_000, 50.0)  # nor does one that was used longer ago
    assert [file.path for file in cache.files()] == [paths[1]]
    cache.touch(paths[1])
    assert cache.files()[0].used_at == 1e6


def test_a_tenth_of_the_free_space_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = folder(tmp_path, limit=1 << 40)
    about = os.statvfs(cache.path)

    class Nearly:
        f_bavail, f_frsize = 100_000 // about.f_frsize + 1, about.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Nearly)
    assert cache.reserve(9_000, 1.0)
    assert not cache.reserve(13_000, 1.0)


def test_no_more_than_so_much_is_written_in_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_files, "MAX_DAILY", 10_000)
    assert folder(tmp_path).reserve(6_000, 1.0)
    assert not folder(tmp_path).reserve(6_000, 1.0)  # another process counts on
    assert folder(tmp_path).reserve(4_000, 1.0)
    assert folder(tmp_path).written() == 10_000
    tomorrow = folder(tmp_path, now=1e6 + cache_files.DAY_S)
    assert tomorrow.written() == 0
    assert tomorrow.reserve(6_000, 1.0)
    for damaged in (b"", b"x", b'{"day":"a"}', json.dumps({"day": 11, "n_bytes": -5}).encode()):
        (tmp_path / "cache" / "written.json").write_bytes(damaged)
        assert folder(tmp_path).written() == 0


def test_what_an_ended_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = folder(tmp_path)
    left = cache.path / ".new-0123456789abcdef"
    left.write_bytes(b"x")
    assert cache.reserve(10, 1.0)
    assert left.exists()  # its process may write still
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert cache.reserve(10, 1.0)
    assert not left.exists()


def test_the_salt_stays_the_same(tmp_path: Path) -> None:
    made = cache_files.salt(tmp_path / "a")
    assert len(made) == 32
    assert cache_files.salt(tmp_path / "a") == made
    assert cache_files.salt(tmp_path / "b") != made
    (tmp_path / "a" / "salt").write_bytes(b"short")
    assert cache_files.salt(tmp_path / "a") != made
    assert stat.S_IMODE((tmp_path / "a" / "salt").stat().st_mode) == 0o600
