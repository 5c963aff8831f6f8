"""The agent as real processes: starts, status, crashes and restarts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.cli.commands import KEY, ROOT, Place, ask, port_of, refused
from tests.serving import command, serve
from tinyoai.cli import agent
from tinyoai.host import instances


@pytest.fixture
def starting(place: Place, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Runs `agent start` for an agent that never gets ready: its key file is a pipe without a writer."""
    os.mkfifo(tmp_path / "keys")
    flags = ["--engine", "fake", "--port", "0", "--api-key-file", str(tmp_path / "keys")]
    process = subprocess.Popen(
        command("agent", "start", *flags),
        env=place.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("starting; the log is")
        yield process
    finally:
        process.kill()
        process.communicate()


def test_an_agent_starts_and_stops(place: Place) -> None:
    done = place.start()
    assert done.returncode == 0, done
    found = place.agent()
    assert f"base URL  {found['base_url']}" in done.stdout
    assert ask(port_of(found)) == 200
    pid = found["pid"]
    assert os.getsid(pid) == pid  # closing the terminal or Ctrl-C does not reach it
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    assert (place.home / agent.LOG).stat().st_mode & 0o777 == 0o600
    again = place.start("--port", "0")
    assert again.returncode == 0
    assert found["base_url"] in again.stdout
    assert place.agent()["pid"] == pid
    assert "has stopped" in place.run("agent", "stop").stdout
    assert place.servers() == []
    done = place.run("agent", "stop")
    assert (done.returncode, done.stdout) == (0, "no agent is running\n")
    assert not Path(f"/proc/{pid}").exists() or not instances.process_of(pid)


def test_a_restart_uses_the_old_flags_or_new_ones(place: Place) -> None:
    assert place.start("--model-name", "first", "--keep-alive=-5m").returncode == 0
    old = place.agent()
    done = place.run("agent", "restart")
    assert done.returncode == 0, done
    new = place.agent()
    assert new["pid"] != old["pid"]
    assert (new["model"], new["engine"]) == ("first", "fake")
    assert place.run("agent", "restart", "--engine", "fake", "--port", "0", "--parallel", "2").returncode == 0
    newest = place.agent()
    assert (newest["model"], newest["requests_at_a_time"]) == ("fake", 2)
    assert place.run("agent", "stop").returncode == 0
    assert place.run("agent", "restart").returncode == 0  # the record outlives the agent
    assert place.agent()["requests_at_a_time"] == 2


def test_a_changed_file_applies_after_a_restart(place: Place) -> None:
    assert place.run("set", "model.engine=fake", "http.port=0").returncode == 0
    assert place.run("agent", "start").returncode == 0
    assert "tinyoai agent restart" in place.run("set", "model.name=changed").stdout
    assert place.agent()["model"] == "fake"
    assert place.run("agent", "restart").returncode == 0
    assert place.agent()["model"] == "changed"


def test_a_change_that_a_stored_flag_overrides_says_so(place: Place) -> None:
    assert place.start("--model-name", "flag").returncode == 0
    for words in (("set", "model.name=file", "model.parallel=2"), ("unset", "model.name")):
        said = place.run(*words).stdout
        assert "--model-name, which overrides the file" in said
        assert "agent restart" not in said
        assert "--parallel" not in said
    assert "tinyoai agent restart" in place.run("set", "model.parallel=3").stdout


def test_a_wrong_value_does_not_stop_the_running_agent(place: Place) -> None:
    assert place.start().returncode == 0
    pid = place.agent()["pid"]
    (place.home / "config.json").write_text('{"log.level": "loud"}')
    assert "log.level in" in refused(place.run("agent", "restart"), 1)
    assert "--parallel" in refused(place.run("agent", "restart", "--parallel", "65"), 2)
    assert place.agent()["pid"] == pid


def test_after_a_crash_no_agent_is_running_and_another_can_start(place: Place) -> None:
    assert place.start().returncode == 0
    old = place.agent()
    os.kill(old["pid"], signal.SIGKILL)
    place.wait(lambda: not instances.process_of(old["pid"]))
    assert place.servers() == []
    assert "no agent is running" in refused(place.run("agent", "status"), 3)
    assert place.run("agent", "stop").stdout == "no agent is running\n"
    assert place.start().returncode == 0
    assert place.agent()["pid"] != old["pid"]


def test_a_process_that_reuses_the_agents_pid_is_not_stopped(place: Place) -> None:
    assert place.start().returncode == 0
    assert place.run("agent", "stop").returncode == 0
    other = subprocess.Popen(["sleep", "600"])
    try:
        mine = instances.process_of(other.pid)
        assert mine is not None
        stale = instances.Process(pid=other.pid, start=mine.start - 1)
        for process in (stale, mine):  # neither process is stopped, although the record names its pid
            record = agent.AgentRecord(process=process, flags={}, had_api_keys=False)
            (place.home / agent.RECORD).write_bytes(msgspec.json.encode(record))
            assert place.run("agent", "stop").stdout == "no agent is running\n"
            assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_an_agent_that_does_not_stop_is_killed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.start("--grace", "0").returncode == 0
    pid = place.agent()["pid"]
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(agent, "SPARE_S", 1.0)
    assert "was killed" in agent.stop(place.home)
    assert not instances.process_of(pid)
    assert list((place.home / "run").iterdir()) == []


def test_an_agent_that_cannot_start_says_why(place: Place, tmp_path: Path) -> None:
    assert "none.gguf" in refused(place.run("agent", "start", "--port", "0", "--model", "/none.gguf"), 1)
    assert place.servers() == []
    with serve("--engine", "fake", env=place.env()) as other:
        line = refused(place.run("agent", "start", "--engine", "fake", "--port", str(other.port)), 1)
        assert "choose another with --port" in line
        assert place.start("--model-name", "good").returncode == 0
        line = refused(place.run("agent", "restart", "--engine", "fake", "--port", str(other.port)), 1)
        assert "choose another with --port" in line
        assert place.run("agent", "restart").returncode == 0  # with the flags that worked last
        assert place.agent()["model"] == "good"
    assert "whole number" in refused(place.run("agent", "start", "--port", "x"), 2)


def test_keys_are_not_in_command_lines_nor_on_disk(place: Place) -> None:
    assert place.start("--api-key", KEY).returncode == 0
    found = place.agent()
    assert ask(port_of(found)) == 401
    assert ask(port_of(found), KEY) == 200
    for pid in instances.family(found["pid"]):
        assert KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    for path in place.home.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    # a restart that lost the keys would let everyone in
    assert "API keys" in refused(place.run("agent", "restart"), 1)
    assert place.agent()["pid"] == found["pid"]
    assert place.run("agent", "restart", TINYOAI_API_KEY=KEY).returncode == 0
    assert ask(port_of(place.agent())) == 401


def test_relative_paths_start_at_the_current_folder(place: Place, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "keys").write_text(f"{KEY} someone\n")
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    env = place.env(PYTHONPATH=str(ROOT), TINYOAI_API_KEY_FILE="keys")
    env["TINYOAI_HOME"] = "home"
    words = ["agent", "start", "--engine", "fake", "--port", "0", "--models-dir", "models"]
    words += ["--chat-template", "own.jinja"]
    done = subprocess.run(
        [sys.executable, "-m", "tinyoai", *words],
        cwd=tmp_path,
        env=env,
        timeout=200,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done
    found = place.agent()
    assert ask(port_of(found)) == 401
    assert ask(port_of(found), KEY) == 200
    flags = Path(f"/proc/{found['pid']}/cmdline").read_bytes()
    assert f"--models-dir={tmp_path}/models".encode() in flags
    assert f"--chat-template={tmp_path}/own.jinja".encode() in flags


def test_warnings_of_the_agent_are_printed_at_its_start(place: Place) -> None:
    done = place.start("--host", "0.0.0.0")
    assert done.returncode == 0, done
    assert "requires no API key" in done.stderr


def test_simultaneous_starts_start_one_agent(place: Place) -> None:
    words = command("agent", "start", "--engine", "fake", "--port", "0")
    starting = [subprocess.Popen(words, env=place.env(), stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=200)[0] for process in starting]
    assert [process.returncode for process in starting] == [0, 0, 0]
    assert sorted("already running" in text for text in outputs) == [False, True, True]
    place.agent()


def test_logs_are_shown_followed_and_renamed(place: Place) -> None:
    assert "no log" in refused(place.run("agent", "logs"), 1)
    place.home.mkdir()
    (place.home / agent.LOG).write_bytes(b"old\n" * (agent.MAX_LOG // 4 + 1))
    assert place.start().returncode == 0
    assert (place.home / f"{agent.LOG}.1").read_bytes().startswith(b"old\n")
    assert place.agent()["base_url"] in place.run("agent", "logs").stdout
    assert len(place.run("agent", "logs", "-n", "2").stdout.splitlines()) == 2
    assert place.run("agent", "logs", "-n", "0").stdout == ""
    follower = subprocess.Popen(
        command("agent", "logs", "-f"),
        env=place.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert follower.stdout is not None
        assert follower.stderr is not None
        assert "agent start" in follower.stdout.readline()
        os.replace(place.home / agent.LOG, place.home / f"{agent.LOG}.1")
        (place.home / agent.LOG).write_text("something new\n")
        while "something new" not in (line := follower.stdout.readline()):
            assert line
        follower.send_signal(signal.SIGINT)
        assert follower.wait(60) == 130
        assert follower.stderr.read() == ""
    finally:
        follower.kill()
        follower.communicate()


def test_ctrl_c_while_it_starts_leaves_no_agent(place: Place, starting: "subprocess.Popen[str]") -> None:
    assert "is starting" in refused(place.run("status"), 3)
    starting.send_signal(signal.SIGINT)
    assert starting.communicate(timeout=60) == ("", "")
    assert starting.returncode == 130
    assert agent.current(place.home) is None


def test_an_agent_that_is_starting_can_be_stopped(place: Place, starting: "subprocess.Popen[str]") -> None:
    assert "has stopped" in place.run("agent", "stop").stdout
    assert "before it was ready" in starting.communicate(timeout=60)[1]
    assert starting.returncode == 1


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "agent.json").write_text(
        '{"process":{"pid":1234567,"start":99},"flags":{"port":"0","cors_origin":["https://a"]},"keyed":true}'
    )
    record = agent.read_record(tmp_path)
    assert record is not None
    assert record.process == instances.Process(pid=1234567, start=99)
    assert (record.flags, record.had_api_keys) == ({"port": "0", "cors_origin": ["https://a"]}, True)
    assert b'"keyed":true' in msgspec.json.encode(record)


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    (tmp_path / agent.RECORD).write_text("{")
    assert f"cannot read {tmp_path}/agent.json" in refused(Place(tmp_path).run("agent", "stop"), 1)


def test_waiting_for_a_start_ends_at_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "sleep", sleep)
    polls = sum(1 for _ in agent._poll(10.0, ""))
    assert 10.0 < now - 100.0 <= 10.0 + 3 * agent.POLL_S
    assert polls > 100
