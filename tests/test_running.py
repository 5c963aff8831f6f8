"""The files that tell of running servers, and that no other process passes for one."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tinyoai import running


def server(process: running.Process, port: int = 1) -> running.Running:
    """A server that says little of itself."""
    return running.Running(
        process=process,
        version="1",
        host="127.0.0.1",
        port=port,
        server=f"http://127.0.0.1:{port}",
        since=time.time(),
        grace=1.0,
        model="m",
        architecture="llama",
        quantization="Q8_0",
        n_ctx=64,
        n_slots=1,
        file_size=1,
        engine="fake",
        n_gpu_layers=0,
    )


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    """Another process of this user."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_what_is_announced_is_found_until_it_is_withdrawn(tmp_path: Path) -> None:
    me = server(running.this())
    path = running.announce(me, tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert running.servers(tmp_path) == [me]
    running.withdraw(path)
    running.withdraw(path)
    assert running.servers(tmp_path) == []


def test_a_number_that_was_given_again_is_another_process(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    process = running.of(sleeper.pid)
    assert process is not None
    assert running.alive(process)
    stale = msgspec.structs.replace(process, start=process.start - 1)
    assert not running.alive(stale)
    path = running.announce(server(stale), tmp_path)
    assert running.servers(tmp_path) == []
    assert not path.exists()


def test_a_process_that_ended_is_gone_before_it_is_collected(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "600"])
    process = running.of(child.pid)
    assert process is not None
    path = running.announce(server(process), tmp_path)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert not running.alive(process)
    assert running.of(child.pid) is None
    assert running.servers(tmp_path) == []
    assert not path.exists()
    child.wait()


def test_a_process_of_another_user_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    process = running.this()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not running.alive(process)


@pytest.mark.parametrize("pid", [0, -1, 1 << 30])
def test_numbers_that_are_no_process(pid: int) -> None:
    assert not running.alive(running.Process(pid=pid, start=0))


def test_a_file_under_another_number_is_not_believed(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    path = running.announce(server(running.this()), tmp_path)
    other = path.with_name(f"{sleeper.pid}.json")
    path.rename(other)
    assert running.servers(tmp_path) == []


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / f"{1 << 30}.json").write_text("{")
    (run / f"{os.getpid()}.json").write_text('{"of": "a newer version"}')
    (run / "notes.json").write_text("{}")
    assert running.servers(tmp_path) == []
    assert sorted(path.name for path in run.iterdir()) == sorted([f"{os.getpid()}.json", "notes.json"])


def test_a_family_is_all_that_a_process_started(sleeper: "subprocess.Popen[bytes]") -> None:
    assert {os.getpid(), sleeper.pid} <= set(running.family(os.getpid()))
    assert running.family(sleeper.pid) == [sleeper.pid]
