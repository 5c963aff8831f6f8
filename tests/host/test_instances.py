"""Records of running servers. No other process counts as a server."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tinyoai.host import instances


def record(process: instances.Process, port: int = 1) -> instances.InstanceRecord:
    """Returns a record of a running server."""
    return instances.InstanceRecord(
        process=process,
        version="1",
        host="127.0.0.1",
        port=port,
        url=f"http://127.0.0.1:{port}",
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
    """Starts another process of this user."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_a_record_is_found_until_it_is_withdrawn(tmp_path: Path) -> None:
    me = record(instances.current_process())
    path = instances.announce(me, tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert instances.servers(tmp_path) == [me]
    instances.withdraw(path)
    instances.withdraw(path)
    assert instances.servers(tmp_path) == []


def test_a_reused_pid_is_another_process(tmp_path: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    process = instances.process_of(sleeper.pid)
    assert process is not None
    assert instances.alive(process)
    stale = msgspec.structs.replace(process, start=process.start - 1)
    assert not instances.alive(stale)
    path = instances.announce(record(stale), tmp_path)
    assert instances.servers(tmp_path) == []
    assert not path.exists()


def test_a_zombie_is_not_alive(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "600"])
    process = instances.process_of(child.pid)
    assert process is not None
    path = instances.announce(record(process), tmp_path)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # the process is a zombie now
    assert not instances.alive(process)
    assert instances.process_of(child.pid) is None
    assert instances.servers(tmp_path) == []
    assert not path.exists()
    child.wait()


def test_a_process_of_another_user_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    process = instances.current_process()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not instances.alive(process)


@pytest.mark.parametrize("pid", [0, -1, 1 << 30])
def test_pids_that_belong_to_no_process(pid: int) -> None:
    assert not instances.alive(instances.Process(pid=pid, start=0))


def test_a_record_under_another_pid_is_ignored(tmp_path: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    path = instances.announce(record(instances.current_process()), tmp_path)
    other = path.with_name(f"{sleeper.pid}.json")
    path.rename(other)
    assert instances.servers(tmp_path) == []


def test_files_that_are_not_records(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / f"{1 << 30}.json").write_text("{")
    (run / f"{os.getpid()}.json").write_text('{"of": "a newer version"}')
    (run / "notes.json").write_text("{}")
    assert instances.servers(tmp_path) == []
    assert sorted(path.name for path in run.iterdir()) == sorted([f"{os.getpid()}.json", "notes.json"])


def test_a_family_is_a_process_and_its_descendants(sleeper: "subprocess.Popen[bytes]") -> None:
    assert {os.getpid(), sleeper.pid} <= set(instances.family(os.getpid()))
    assert instances.family(sleeper.pid) == [sleeper.pid]


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    me = instances.current_process()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"{me.pid}.json").write_text(
        f'{{"process":{{"pid":{me.pid},"start":{me.start}}},"version":"0.1.0","host":"127.0.0.1","port":8000,'
        '"server":"http://127.0.0.1:8000","since":1.5,"grace":20.0,"model":"tinyoai-chat","architecture":"llama",'
        '"quantization":"Q8_0","n_ctx":1024,"n_slots":4,"file_size":4000000,"engine":"ctransformers",'
        '"n_gpu_layers":0}'
    )
    (found,) = instances.servers(tmp_path)
    assert (found.process, found.base_url) == (me, "http://127.0.0.1:8000/v1")
