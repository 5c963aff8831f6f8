"""`status` and `agent`, as real processes: started, asked, killed, started again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.serving import command, environment, serve
from tinyoai.cli import agent, status
from tinyoai.host import instances

KEY = "sk-0123456789abcdefghij"


class Place:
    """A data directory, and the command on it."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def env(self, **extra: str) -> dict[str, str]:
        """The environment of every command."""
        return environment(TINYOAI_HOME=str(self.home), **extra)

    def run(self, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
        """The command, to its end."""
        return subprocess.run(
            command(*words), capture_output=True, text=True, timeout=200, env=self.env(**env), check=False
        )

    def start(self, *flags: str, **env: str) -> "subprocess.CompletedProcess[str]":
        """An agent with the scripted engine on a free port."""
        return self.run("agent", "start", "--engine", "fake", "--port", "0", *flags, **env)

    def servers(self, *words: str) -> list[Any]:
        """What status says to programs."""
        done = self.run(*(words or ("status",)), "--json")
        found = json.loads(done.stdout)
        assert done.returncode == (0 if found else 3), done
        return list(found)

    def agent(self) -> Any:
        """What status says of the one agent."""
        (found,) = self.servers("agent", "status")
        assert found["agent"] is True
        return found

    def wait(self, what: Callable[[], object]) -> None:
        """Until it is so."""
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A data directory of its own, whose agent ends with the test whatever happens."""
    made = Place(tmp_path / "home")
    try:
        yield made
    finally:
        known = agent.note(made.home)
        if known is not None and agent.current(made.home) is not None:
            os.kill(known.process.pid, signal.SIGKILL)
            made.wait(lambda: not instances.alive(known.process))


@pytest.fixture
def starting(place: Place, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """An agent that is being started and never ready: its file of keys is a pipe that nobody writes to."""
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
        assert process.stderr.readline().startswith("starting; what the agent says is in")
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(port: int, key: str = "") -> int:
    """The status of a request that needs a key where keys are asked for."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
        return connection.getresponse().status
    finally:
        connection.close()


def port_of(found: Any) -> int:
    """The port that a server of status is on."""
    return int(found["server"].rpartition(":")[2])


def refused(done: "subprocess.CompletedProcess[str]", code: int) -> str:
    """The one line that it said."""
    assert done.returncode == code, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("tinyoai: ")
    return line


def of_box(text: str) -> dict[str, str]:
    """The rows of a table."""
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1, text
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line[0] == "|"]
    assert rows[0] == ["Property", "Value"]
    return {row[0]: row[1] for row in rows}


# -- status ------------------------------------------------------------------------------------------


def test_status_without_a_server_says_how_to_start_one(place: Place) -> None:
    done = place.run("status")
    assert "tinyoai agent start" in refused(done, 3)
    assert done.stdout == ""
    assert place.servers() == []


def test_status_shows_a_server_that_asks_for_keys_and_needs_none(place: Place) -> None:
    with serve(env=place.env(TINYOAI_API_KEY=KEY)) as server:
        place.wait(lambda: instances.servers(place.home))
        done = place.run("status")
        assert done.returncode == 0, done
        rows = of_box(done.stdout)
        root = server.url.removesuffix("/v1")
        assert rows["Server"] == root
        assert rows["Base URL"] == server.url
        assert rows["API docs"] == f"{root}/docs"
        assert rows["PID"] == str(server.process.pid)
        assert (rows["State"], rows["Agent"], rows["Model loaded"]) == ("ok", "False", "True")
        assert (rows["Model"], rows["Quantization"], rows["Context window"]) == (
            "tinyoai-chat",
            "Q8_0",
            "1024",
        )
        assert (rows["Flash attention"], rows["GPU"], rows["Engine"]) == ("False", "none", "ctransformers")
        assert rows["Model size"].endswith(" MB")
        assert rows["Home"] == str(place.home)
        (found,) = place.servers()
        assert (
            found["model_size"]
            == (Path(status.__file__).parent / "builtin" / "tinyoai-chat.gguf").stat().st_size
        )
        workers = server.workers
        assert workers
        assert found["memory_used"] > status.memory.resident(server.process.pid)
        assert KEY not in done.stdout
        unload = json.dumps({"name": "tinyoai-chat"}).encode()
        assert (
            server.request("POST", "/v1/models/unload", unload, {"Authorization": f"Bearer {KEY}"}).status
            == 200
        )
        assert of_box(place.run("status").stdout)["Model loaded"] == "False (unloaded)"
        assert server.stop() == 0
    assert place.servers() == []
    assert list((place.home / "run").iterdir()) == []


def test_two_servers_on_one_data_directory_have_a_table_each(place: Place) -> None:
    with (
        serve("--engine", "fake", "--model-name", "one", env=place.env()) as first,
        serve("--engine", "fake", "--model-name", "two", env=place.env()) as second,
    ):
        place.wait(lambda: len(instances.servers(place.home)) == 2)
        tables = place.run("status").stdout.split("\n\n")
        assert [of_box(table)["Model"] for table in tables] == ["one", "two"]
        second.process.kill()
        second.process.wait()
        (found,) = place.servers()
        assert found["pid"] == first.process.pid
        assert "no agent is running" in place.run("agent", "stop").stdout
        assert ask(first.port) == 200  # that was started by hand
        changed = place.run("set", "http.port=9090").stdout
        assert f"http://127.0.0.1:{first.port}" in changed


def test_a_server_whose_home_cannot_be_written_serves_all_the_same(place: Place) -> None:
    place.home.write_text("a file stands in the way")
    with serve("--engine", "fake", env=place.env()) as server:
        assert ask(server.port) == 200
        assert server.stop() == 0
        assert server.process.stderr is not None
        assert "tinyoai status will not show this server" in server.process.stderr.read()


def test_status_of_a_server_that_hangs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "PATIENCE_S", 0.2)
    with serve("--engine", "fake", env=place.env()) as server:
        place.wait(lambda: instances.servers(place.home))
        server.process.send_signal(signal.SIGSTOP)
        (found,) = instances.servers(place.home)
        assert (
            of_box(status.table(status.facts(found, place.home, None)))["State"] == "no answer within 0.2 s"
        )
        server.process.send_signal(signal.SIGCONT)


def test_status_of_a_server_on_another_address(place: Place) -> None:
    with serve("--engine", "fake", "--host", "::1", env=place.env()) as server:
        place.wait(lambda: instances.servers(place.home))
        (found,) = place.servers()
        assert (found["base_url"], found["state"]) == (f"http://[::1]:{server.port}/v1", "ok")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59, "59 s"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (90_000, "1 d 1 h")],
)
def test_times_are_told_in_two_units(seconds: int, said: str) -> None:
    assert status.duration(seconds) == said


# -- agent -------------------------------------------------------------------------------------------


def test_an_agent_starts_runs_on_and_stops(place: Place) -> None:
    done = place.start()
    assert done.returncode == 0, done
    found = place.agent()
    assert f"base URL  {found['base_url']}" in done.stdout
    assert ask(port_of(found)) == 200
    pid = found["pid"]
    assert os.getsid(pid) == pid  # no terminal's end, and no Ctrl-C, reaches it
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
    assert not Path(f"/proc/{pid}").exists() or not instances.of(pid)


def test_a_restart_takes_the_old_flags_or_new_ones(place: Place) -> None:
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
    assert place.run("agent", "restart").returncode == 0  # what is remembered outlives it
    assert place.agent()["requests_at_a_time"] == 2


def test_a_setting_takes_effect_after_a_restart(place: Place) -> None:
    assert place.run("set", "model.engine=fake", "http.port=0").returncode == 0
    assert place.run("agent", "start").returncode == 0
    assert "tinyoai agent restart" in place.run("set", "model.name=changed").stdout
    assert place.agent()["model"] == "fake"
    assert place.run("agent", "restart").returncode == 0
    assert place.agent()["model"] == "changed"


def test_a_setting_under_a_remembered_flag_says_that_a_restart_is_not_enough(place: Place) -> None:
    assert place.start("--model-name", "flag").returncode == 0
    for words in (("set", "model.name=file", "model.parallel=2"), ("unset", "model.name")):
        said = place.run(*words).stdout
        assert "--model-name, and a flag wins" in said
        assert "agent restart" not in said
        assert "--parallel" not in said
    assert "tinyoai agent restart" in place.run("set", "model.parallel=3").stdout


def test_a_wrong_setting_does_not_end_the_agent_that_runs(place: Place) -> None:
    assert place.start().returncode == 0
    pid = place.agent()["pid"]
    (place.home / "config.json").write_text('{"log.level": "loud"}')
    assert "log.level in" in refused(place.run("agent", "restart"), 1)
    assert "--parallel" in refused(place.run("agent", "restart", "--parallel", "0"), 2)
    assert place.agent()["pid"] == pid


def test_after_a_crash_nothing_is_running_and_another_can_start(place: Place) -> None:
    assert place.start().returncode == 0
    old = place.agent()
    os.kill(old["pid"], signal.SIGKILL)
    place.wait(lambda: not instances.of(old["pid"]))
    assert place.servers() == []
    assert "no agent is running" in refused(place.run("agent", "status"), 3)
    assert place.run("agent", "stop").stdout == "no agent is running\n"
    assert place.start().returncode == 0
    assert place.agent()["pid"] != old["pid"]


def test_a_process_that_was_given_the_agents_number_is_not_ended(place: Place) -> None:
    assert place.start().returncode == 0
    assert place.run("agent", "stop").returncode == 0
    other = subprocess.Popen(["sleep", "600"])
    try:
        mine = instances.of(other.pid)
        assert mine is not None
        stale = instances.Process(pid=other.pid, start=mine.start - 1)
        for process in (stale, mine):  # nor one that somebody wrote down there
            known = agent.Note(process=process, flags={}, keyed=False)
            (place.home / agent.NOTE).write_bytes(msgspec.json.encode(known))
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
    assert not instances.of(pid)
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
        assert place.run("agent", "restart").returncode == 0  # with the flags that were good
        assert place.agent()["model"] == "good"
    assert "whole number" in refused(place.run("agent", "start", "--port", "x"), 2)


def test_keys_are_not_in_the_list_of_processes_nor_on_disk(place: Place) -> None:
    assert place.start("--api-key", KEY).returncode == 0
    found = place.agent()
    assert ask(port_of(found)) == 401
    assert ask(port_of(found), KEY) == 200
    for pid in instances.family(found["pid"]):
        assert KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    for path in place.home.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    # a restart that forgets them would open the door
    assert "API keys" in refused(place.run("agent", "restart"), 1)
    assert place.agent()["pid"] == found["pid"]
    assert place.run("agent", "restart", TINYOAI_API_KEY=KEY).returncode == 0
    assert ask(port_of(place.agent())) == 401


def test_relative_paths_are_those_of_who_started_it(place: Place, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "keys").write_text(f"{KEY} someone\n")
    env = place.env(PYTHONPATH=str(Path(__file__).parent.parent), TINYOAI_API_KEY_FILE="keys")
    env["TINYOAI_HOME"] = "home"
    words = ["agent", "start", "--engine", "fake", "--port", "0", "--models-dir", "models"]
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
    assert f"--models-dir={tmp_path}/models".encode() in Path(f"/proc/{found['pid']}/cmdline").read_bytes()


def test_what_an_agent_warns_of_is_seen_by_who_starts_it(place: Place) -> None:
    done = place.start("--host", "0.0.0.0")
    assert done.returncode == 0, done
    assert "asks for no key" in done.stderr


def test_of_many_that_start_it_at_once_one_does(place: Place) -> None:
    words = command("agent", "start", "--engine", "fake", "--port", "0")
    starting = [subprocess.Popen(words, env=place.env(), stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [process.communicate(timeout=200)[0] for process in starting]
    assert [process.returncode for process in starting] == [0, 0, 0]
    assert sorted("running already" in text for text in told) == [False, True, True]
    place.agent()


def test_logs_are_shown_followed_and_put_aside(place: Place) -> None:
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


# -- help --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [["status"], ["get"], ["set"], ["unset"], ["agent", "start"], ["agent", "stop"], ["agent", "restart"],
     ["agent", "status"], ["agent", "logs"]],
    ids=" ".join,
)  # fmt: skip
def test_every_command_has_help_with_examples(words: list[str], place: Place) -> None:
    done = place.run(*words, "--help")
    assert done.returncode == 0
    assert f"usage: tinyoai {' '.join(words)}" in done.stdout
    assert f"  tinyoai {' '.join(words)}" in done.stdout.split("examples:")[1]


def test_the_help_names_every_command(place: Place) -> None:
    told = place.run("--help").stdout
    for word in ("serve", "status", "agent start", "get", "set", "unset"):
        assert f"  {word}" in told or f" {word}" in told.split("commands")[1]
    assert place.run("serve", "--help").stdout == told
    told = place.run("agent", "--help").stdout
    for word in ("start", "stop", "restart", "status", "logs"):
        assert f"\n  {word} " in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["statsu"], "did you mean status?"),
        (["agent"], "start, stop, restart"),
        (["agent", "strat"], "did you mean start?"),
        (["agent", "start", "--prot", "1"], "did you mean --port?"),
        (["agent", "logs", "-n", "-1"], "0 or more"),
        (["agent", "logs", "-x"], "no flag -x"),
        (["status", "--jsno"], "did you mean --json?"),
        (["status", "now"], "unrecognized arguments: now"),
        (["get", "http.prot"], "did you mean http.port?"),
        (["unset", "http.prot"], "did you mean http.port?"),
        (["set"], "key=value"),
        (["--port", "0", "status"], "status comes first"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(words: list[str], said: str, place: Place) -> None:
    done = place.run(*words)
    assert said in refused(done, 2)
    assert done.stdout == ""


def test_a_reader_that_leaves_is_no_traceback(place: Place) -> None:
    line = " ".join([*command("get"), "| head -c 1; exit ${PIPESTATUS[0]}"])
    done = subprocess.run(
        ["bash", "-c", line], env=place.env(), capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["status"], ["agent", "status"], ["agent", "stop"], ["get"]], ids=" ".join)
def test_the_server_is_not_imported_to_ask_for_it(words: list[str], place: Place) -> None:
    program = (
        "import sys; from tinyoai.cli.main import main; main(sys.argv[1:]);"
        "print({'uvloop', 'tinyoai.app', 'tinyoai.web', 'asyncio'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=place.env(), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "set()"
