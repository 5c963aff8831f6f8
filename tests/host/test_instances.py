"""The files that tell of running servers, and that no other process passes for one."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tinyoai.host import instances


def server(process: instances.Process, port: int = 1) -> instances.Running:
    """A server that says little of itself."""
    return instances.Running(
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
    me = server(instances.this())
    path = instances.announce(me, tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert instances.servers(tmp_path) == [me]
    instances.withdraw(path)
    instances.withdraw(path)
    assert instances.servers(tmp_path) == []


def test_a_number_that_was_given_again_is_another_process(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    process = instances.of(sleeper.pid)
    assert process is not None
    assert instances.alive(process)
    stale = msgspec.structs.replace(process, start=process.start - 1)
    assert not instances.alive(stale)
    path = instances.announce(server(stale), tmp_path)
    assert instances.servers(tmp_path) == []
    assert not path.exists()


def test_a_process_that_ended_is_gone_before_it_is_collected(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "600"])
    process = instances.of(child.pid)
    assert process is not None
    path = instances.announce(server(process), tmp_path)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert not instances.alive(process)
    assert instances.of(child.pid) is None
    assert instances.servers(tmp_path) == []
    assert not path.exists()
    child.wait()


def test_a_process_of_another_user_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    process = instances.this()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not instances.alive(process)


@pytest.mark.parametrize("pid", [0, -1, 1 << 30])
def test_numbers_that_are_no_process(pid: int) -> None:
    assert not instances.alive(instances.Process(pid=pid, start=0))


def test_a_file_under_another_number_is_not_believed(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    path = instances.announce(server(instances.this()), tmp_path)
    other = path.with_name(f"{sleeper.pid}.json")
    path.rename(other)
    assert instances.servers(tmp_path) == []


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / f"{1 << 30}.json").write_text("{")
    (run / f"{os.getpid()}.json").write_text('{"of": "a newer version"}')
    (run / "notes.json").write_text("{}")
    assert instances.servers(tmp_path) == []
    assert sorted(path.name for path in run.iterdir()) == sorted([f"{os.getpid()}.json", "notes.json"])


def test_a_family_is_all_that_a_process_started(sleeper: "subprocess.Popen[bytes]") -> None:
    assert {os.getpid(), sleeper.pid} <= set(instances.family(os.getpid()))
    assert instances.family(sleeper.pid) == [sleeper.pid]
