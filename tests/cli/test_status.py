"""`status`: tables and JSON of real servers."""

import json
import signal

import pytest

from tests.cli.commands import KEY, Place, ask, of_box, refused
from tests.serving import serve
from tinyoai.app import BUILTIN
from tinyoai.cli import status
from tinyoai.host import instances, memory


def test_status_without_a_server_says_how_to_start_one(place: Place) -> None:
    done = place.run("status")
    assert "tinyoai agent start" in refused(done, 3)
    assert done.stdout == ""
    assert place.servers() == []


def test_status_needs_no_key_of_a_server_with_keys(place: Place) -> None:
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
        assert (rows["Flash attention"], rows["GPU"], rows["Engine"]) == (
            "False",
            "none",
            "ctransformers 0.2.27",
        )
        assert rows["Model size"].endswith(" MB")
        assert rows["Home"] == str(place.home)
        (found,) = place.servers()
        assert found["model_size"] == BUILTIN.stat().st_size
        workers = server.workers
        assert workers
        assert found["memory_used"] > memory.resident(server.process.pid)
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
        assert ask(first.port) == 200  # `agent stop` does not touch it
        changed = place.run("set", "http.port=9090").stdout
        assert f"http://127.0.0.1:{first.port}" in changed


def test_a_server_with_an_unwritable_data_directory_serves_anyway(place: Place) -> None:
    place.home.write_text("in the way")
    with serve("--engine", "fake", env=place.env()) as server:
        assert ask(server.port) == 200
        assert server.stop() == 0
        assert server.process.stderr is not None
        assert "tinyoai status will not show this server" in server.process.stderr.read()


def test_status_of_a_server_that_hangs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "TIMEOUT_S", 0.2)
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
def test_durations_have_two_units(seconds: int, said: str) -> None:
    assert status.duration(seconds) == said
