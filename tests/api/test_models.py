"""Models over HTTP: discovery, lists, loads, unloads, status and errors; the registry across servers."""

import json
import os
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines import make
from tests.serving import Server, command, environment, serve

LONG = '!{"text": "x", "repeat": 1500, "step_ms": 10}'


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder that no test changes."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "org").mkdir()
    make.llama(folder / "org" / "small.gguf", n_embd=64, n_ctx=256)
    make.llama(folder / "tuned.gguf", n_embd=64, n_ctx=256)
    settings = {
        "aliases": ["gpt-4o", "org/alias"],
        "template": "alpaca",
        "context": 128,
        "defaults": {"max_tokens": 3, "temperature": 0},
    }
    (folder / "tuned.json").write_text(json.dumps(settings))
    whole = (folder / "tuned.gguf").read_bytes()
    (folder / "org" / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture(scope="module")
def served(files: Path) -> Iterator[Server]:
    """A server with the folder's models, which run on ctransformers, and the built-in model."""
    with serve("--models-dir", str(files)) as server:
        yield server


@pytest.fixture
def own(tmp_path: Path, files: Path) -> Path:
    """A models folder with `a` and `b` that a test may change."""
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("a", "b"):
        os.link(files / "org" / "small.gguf", folder / f"{name}.gguf")
    return folder


def status(server: Server, name: str) -> dict[str, Any]:
    """Returns the status of one model."""
    (row,) = (row for row in server.get("/v1/models/status").json["data"] if row["id"] == name)
    return dict(row)


def until(server: Server, name: str, **wanted: Any) -> dict[str, Any]:
    """Waits until the status has these values and returns it."""
    for _ in range(400):
        row = status(server, name)
        if all(row[key] == value for key, value in wanted.items()):
            return row
        time.sleep(0.02)
    raise AssertionError(f"never {wanted}: {row}")


# -- discovery -------------------------------------------------------------------------------------


def test_a_second_model_answers(served: Server) -> None:
    reply = served.chat("Hello!", model="org/small", max_tokens=5)
    assert reply.status == 200
    assert reply.json["model"] == "org/small"
    assert (
        served.say("What is the capital of France?", model="tinyoai-chat")
        == "The capital of France is Paris."
    )
    assert len(served.workers) >= 2


def test_the_list_has_openais_fields_and_describes_the_files(served: Server) -> None:
    listed = served.get("/v1/models").json
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["tinyoai-chat", "org/small", "tuned"]
    for card in listed["data"]:
        assert card["object"] == "model"
        assert isinstance(card["created"], int)
        assert card["owned_by"]
    tuned = listed["data"][2]
    assert tuned["aliases"] == ["gpt-4o", "org/alias"]
    assert tuned["defaults"] == {"max_tokens": 3, "temperature": 0.0}
    assert tuned["default_sources"]["temperature"] == "settings"
    assert tuned["default_sources"]["top_p"] == "openai"
    assert tuned["engine"] == "ctransformers"
    assert (tuned["type"], tuned["architecture"], tuned["quantization"]) == ("chat", "llama", "Q8_0")
    assert (tuned["context_length"], tuned["max_context_length"]) == (128, 256)
    assert len({card["model_id"] for card in listed["data"]}) == 3
    for card in listed["data"]:
        # every client reads the served window from a different field
        window = card["context_length"]
        assert card["max_model_len"] == card["context_window"] == card["meta"]["n_ctx"] == window
        assert card["meta"]["n_ctx_train"] == card["max_context_length"]
        assert card["meta"]["n_params"] == card["parameters"] > 0
        assert card["meta"]["size"] == card["size_bytes"] > 0


def test_capabilities(served: Server) -> None:
    assert served.chat("Hello!", model="tuned").status == 200
    cards = {card["id"]: card for card in served.get("/v1/models").json["data"]}
    assert cards["tuned"]["state"] == "ready"
    assert cards["tuned"]["capabilities"] == ["completion", "chat", "embedding"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("chat", ["completion", "chat"]), ("completion", ["completion"]), ("embedding", ["embedding"])],
)
def test_capabilities_of_a_model_that_is_not_loaded(tmp_path: Path, kind: str, expected: list[str]) -> None:
    make.llama(tmp_path / "x.gguf", n_embd=64, n_ctx=256)
    # of ctransformers only a load shows whether it can embed a model
    (tmp_path / "x.json").write_text(json.dumps({"kind": kind, "engine": "ctransformers"}))
    with serve("--models-dir", str(tmp_path)) as server:
        assert server.get("/v1/models/x").json["capabilities"] == expected


@pytest.mark.parametrize("path", ["org/small", "org%2Fsmall", "org/small/"])
def test_the_card_of_one_model(served: Server, path: str) -> None:
    assert served.get(f"/v1/models/{path}").json["id"] == "org/small"


def test_a_card_is_found_by_name_and_alias(served: Server) -> None:
    assert "org/small" in [card["id"] for card in served.get("/v1/models").json["data"]]
    assert served.get("/v1/models/gpt-4o").json["id"] == "tuned"
    missing = served.get("/v1/models/gpt-5")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    "name",
    [
        "gpt-4",
        "org",
        "small",
        "org/small.gguf",
        "ORG/SMALL",
        "../models/org/small",
        "./org/small",
        "/etc/passwd",
        "org/cut",
        "registry.db",
        "a\nb",
        "\N{PILE OF POO}" * 128,
    ],
)
def test_an_unknown_model_is_a_404_everywhere(served: Server, name: str) -> None:
    for reply in (
        served.chat("Hello!", model=name),
        served.post("/v1/completions", model=name, prompt="Hello"),
        served.post("/v1/models/load", model=name),
        served.post("/v1/models/unload", model=name),
    ):
        assert reply.status == 404, reply.body
        assert reply.error["code"] == "model_not_found"
        assert reply.error["param"] == "model"


def test_a_file_name_is_not_a_model_name(served: Server, files: Path) -> None:
    for name in (
        str(files / "org" / "small.gguf"),
        str(files / "org" / "small"),
        f"file://{files}/org/small",
    ):
        assert served.post("/v1/models/load", name=name, model=None).status == 404


def test_a_new_file_is_served_on_request(own: Path) -> None:
    with serve("--engine", "fake", "--models-dir", str(own)) as server:
        assert f"the models in {own}," in server.banner
        assert server.chat("x", model="org/new").status == 404
        (own / "org").mkdir()
        os.link(own / "a.gguf", own / "org" / "new.gguf")
        assert server.say("hello", model="org/new") == "hello"
        assert "org/new" in [card["id"] for card in server.get("/v1/models").json["data"]]


def test_a_broken_file_is_listed_with_its_reason_and_not_served(served: Server) -> None:
    row = status(served, "org/cut")
    assert row["state"] == "broken"
    assert "cut short" in row["reason"]
    assert row["pid"] is None
    assert "cut short" in served.chat("x", model="org/cut").error["message"]
    assert served.get("/v1/models/org/cut").status == 404


def test_a_vanished_file_is_reported_and_not_served(own: Path) -> None:
    with serve("--engine", "fake", "--models-dir", str(own)) as server:
        assert server.say("hello", model="b") == "hello"
        for name in ("a", "b"):
            (own / f"{name}.gguf").unlink()
        row = status(server, "a")
        assert (row["state"], row["reason"]) == ("missing", "its file is gone")
        reply = server.request("POST", "/v1/models/load", {"name": "a"})
        assert reply.status == 404
        assert "'a' is gone" in reply.error["message"]
        assert [card["id"] for card in server.get("/v1/models").json["data"]] == ["fake"]
        row = status(server, "b")  # a loaded file is mapped, so the model stays
        assert (row["state"], row["reason"]) == ("ready", "its file is gone")
        assert server.post("/v1/models/unload", model="b").json["status"] == "unloaded"
        assert server.chat("x", model="b").status == 404


# -- defaults of a model ----------------------------------------------------------------------------


def test_an_answer_to_an_alias_has_the_served_id(served: Server) -> None:
    assert served.chat("Hello!", model="gpt-4o").json["model"] == "tuned"
    events = served.chat("Hello!", model="org/alias", stream=True).events
    assert {event["model"] for event in events[:-1]} == {"tuned"}
    assert served.post("/v1/completions", model="gpt-4o", prompt="a").json["model"] == "tuned"


def test_model_defaults_apply_where_the_request_sets_nothing(served: Server) -> None:
    def tokens(**fields: Any) -> int:
        reply = served.chat("Hello!", model="tuned", ignore_eos=True, **fields)
        return int(reply.json["usage"]["completion_tokens"])

    assert tokens() == 3
    assert tokens(max_tokens=5) == 5
    assert tokens(max_completion_tokens=6) == 6
    assert tokens(max_tokens=None) == 3
    reply = served.post("/v1/completions", model="tuned", prompt="a", ignore_eos=True)
    assert reply.json["usage"]["completion_tokens"] == 3
    texts = {
        served.chat("Hi", model="tuned").body.partition(b'"message"')[2].partition(b"}")[0] for _ in range(4)
    }
    assert len(texts) == 1  # the model's default temperature is 0


def test_template_and_context_of_a_model(served: Server) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    prompt = served.post("/apply-template", model="tuned", messages=messages).json["prompt"]
    assert "### Instruction:" in prompt
    assert (
        "<|im_start|>" in served.post("/apply-template", model="org/small", messages=messages).json["prompt"]
    )
    reply = served.post("/v1/completions", model="tuned", prompt=[300] * 128)
    assert reply.error["code"] == "context_length_exceeded"


def test_flags_override_the_settings_of_a_model(files: Path) -> None:
    flags = ("--models-dir", str(files), "--ctx-size", "192", "--chat-template", "plain")
    with serve(*flags) as server:
        assert server.get("/v1/models/tuned").json["context_length"] == 192
        messages = [{"role": "user", "content": "Hello!"}]
        prompt = server.post("/apply-template", model="tuned", messages=messages).json["prompt"]
        assert "### Instruction:" not in prompt


# -- loading and unloading -------------------------------------------------------------------------


def test_load_and_unload(own: Path) -> None:
    with serve("--engine", "fake", "--models-dir", str(own)) as server:
        assert len(server.workers) == 1
        first = server.request("POST", "/v1/models/load", {"name": "a"})
        assert first.status == 200
        assert first.json["status"] == "loaded"
        assert first.json["name"] == first.json["model"] == "a"
        assert len(server.workers) == 2
        assert server.request("POST", "/v1/models/load", {"model": "a"}).json["status"] == "already_loaded"
        assert server.request("POST", "/v1/models/unload", {"name": "a"}).json["status"] == "unloaded"
        assert len(server.workers) == 1
        assert server.request("POST", "/models/unload", {"name": "a"}).json["status"] == "not_loaded"
        assert server.say("again", model="a") == "again"
        assert server.post("/v1/models/unload", model="fake").json["status"] == "unloaded"
        assert server.get("/health").json["status"] == "ok"  # the next request loads it again
        assert server.say("me too", model="fake") == "me too"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": 5}, "name"),
        ({"name": None}, "name"),
        ({"name": ["a"]}, "name"),
        ({"name": "x" * 600}, "name"),
        ({"name": "fake", "model": "other"}, "model"),
        ([], None),
        (b"", None),
        (b"{", None),
    ],
)
def test_a_wrong_body_is_rejected(fake: Server, body: Any, param: str | None) -> None:
    for path in ("/v1/models/load", "/v1/models/unload"):
        reply = fake.request("POST", path, body, {"Content-Type": "application/json"})
        assert reply.status == 400
        assert reply.error["param"] == param


@pytest.mark.parametrize("value", ["soon", "5 parsecs", "", "m", "1d", True, [], {}, "x" * 40, "\u0665m"])
def test_a_wrong_keep_alive_is_rejected(fake: Server, value: Any) -> None:
    for reply in (
        fake.chat("x", keep_alive=value),
        fake.post("/v1/completions", prompt="x", keep_alive=value),
        fake.post("/v1/models/load", keep_alive=value),
    ):
        assert reply.status == 400
        assert reply.error["param"] == "keep_alive"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (300, 300),
        (1.5, 1.5),
        ("90", 90),
        ("10m", 600),
        ("1h30m", 5400),
        ("0.5h", 1800),
        (1e300, 1e9),
        (-1, -1),
        ("-5m", -1),
    ],
)
def test_keep_alive_in_every_form(fake: Server, value: Any, seconds: float) -> None:
    assert fake.say("x", keep_alive=value) == "x"
    row = status(fake, "fake")
    assert row["keep_alive"] == seconds
    if seconds > 0:
        assert seconds - 30 < row["unloads_in"] < seconds + 0.001
    else:
        assert row["unloads_in"] is None
    assert fake.say("x", keep_alive=-1) == "x"


def test_keep_alive_0_unloads_after_the_answer(own: Path) -> None:
    with serve("--engine", "fake", "--models-dir", str(own)) as server:
        assert server.say("hello", model="a", keep_alive=0) == "hello"
        until(server, "a", state="unloaded", pid=None)
        assert server.chat("x", model="b", stream=True, keep_alive="0s").events[-1] == "[DONE]"
        until(server, "b", state="unloaded")


def test_the_default_keep_alive_of_the_server(own: Path) -> None:
    with serve("--engine", "fake", "--models-dir", str(own), "--keep-alive", "0") as server:
        until(server, "fake", state="unloaded")
        assert server.say("hello", model="a") == "hello"
        until(server, "a", state="unloaded")
        assert server.say("hello", model="a", keep_alive=-1) == "hello"
        assert status(server, "a")["state"] == "ready"


def test_unloading_a_model_in_use_lets_its_answers_finish(own: Path) -> None:
    with serve("--engine", "fake", "--models-dir", str(own)) as server:
        replies = []
        thread = threading.Thread(target=lambda: replies.append(server.chat(LONG, model="a", max_tokens=150)))
        thread.start()
        until(server, "a", in_use=1, state="ready")
        assert server.request("POST", "/v1/models/unload", {"name": "a"}).json["status"] == "unloading"
        thread.join()
        assert replies[0].json["usage"]["completion_tokens"] == 150
        until(server, "a", state="unloaded")


# -- status ----------------------------------------------------------------------------------------


def test_status_of_a_model_at_work(own: Path) -> None:
    with serve("--engine", "fake", "--models-dir", str(own), "--parallel", "1") as server:
        before = status(server, "a")
        assert before["state"] == "unloaded"
        assert before["pid"] is before["slots"] is before["uptime"] is before["last_used"] is None
        threads = [
            threading.Thread(target=lambda: server.chat(LONG, model="a", max_tokens=150)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        row = until(server, "a", queue=2)
        assert row["slots"] == {"total": 1, "busy": 1, "free": 0}
        assert row["in_use"] == 3
        assert row["pid"] in server.workers
        for thread in threads:
            thread.join()
        row = until(server, "a", in_use=0, queue=0)
        assert row["slots"] == {"total": 1, "busy": 0, "free": 1}
        assert row["answers"] == 3
        assert 0 < row["tokens_per_second"] < 110  # a token takes 10 ms
        assert abs(time.time() - row["last_used"]) < 60
        assert 0 < row["uptime"] < 120
        assert row["type"] == "chat"
        assert 4 << 20 < row["memory"]["resident_bytes"] < row["memory"]["estimated_bytes"]
        whole = server.get("/v1/models/status").json
        estimates = [row["memory"]["estimated_bytes"] for row in whole["data"] if row["pid"]]
        assert whole["memory"]["reserved_bytes"] == sum(estimates)
        assert whole["memory"]["reserved_bytes"] < whole["memory"]["budget_bytes"]
        assert whole["registry"] == {"problem": ""}


# -- memory ----------------------------------------------------------------------------------------


def test_a_model_that_cannot_fit_is_rejected_before_loading(tmp_path: Path) -> None:
    make.llama(tmp_path / "big.gguf", n_embd=256, n_head=4, n_layer=8, n_ctx=4096)
    flags = ("--models-dir", str(tmp_path), "--memory-budget")
    with serve(*flags, "120M") as server:
        workers = server.workers
        for reply in (server.chat("x", model="big"), server.post("/v1/models/load", name="big", model=None)):
            assert reply.status == 503
            assert reply.error["code"] == "insufficient_memory"
            assert reply.error["type"] == "service_unavailable"
            assert reply.headers["x-should-retry"] == "false"
            fits = int(reply.error["message"].partition("--ctx-size ")[2].partition(")")[0])
        assert server.workers == workers
        assert status(server, "tinyoai-chat")["state"] == "ready"
        assert server.get("/v1/models/status").json["memory"]["budget_bytes"] == 120 << 20
    with serve(*flags, "120M", "--ctx-size", str(fits)) as server:
        assert server.chat("fits", model="big", max_tokens=1).status == 200
        assert status(server, "tinyoai-chat")["state"] == "unloaded"  # it was unloaded for `big`
    with serve(*flags, "120M", "--ctx-size", str(fits + 32)) as server:
        assert server.chat("x", model="big").status == 503


def test_idle_models_are_unloaded_for_the_requested_one(own: Path) -> None:
    with serve("--engine", "fake", "--models-dir", str(own), "--memory-budget", "105M") as server:
        for name in ("a", "b", "a"):
            assert server.say("hello", model=name) == "hello"
        states = {row["id"]: row["state"] for row in server.get("/v1/models/status").json["data"]}
        assert states == {"fake": "unloaded", "a": "ready", "b": "ready"}
        assert server.say("hello", model="fake") == "hello"
        states = {row["id"]: row["state"] for row in server.get("/v1/models/status").json["data"]}
        assert states == {"fake": "ready", "a": "ready", "b": "unloaded"}


def test_the_budget_applies_to_the_first_model(files: Path) -> None:
    done = subprocess.run(
        command("--port", "0", "--model", str(files / "org" / "small.gguf"), "--memory-budget", "1M"),
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=False,
    )
    assert done.returncode == 1
    assert "'small' needs about" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--keep-alive", "soon"], 2, "--keep-alive"),
        (["--memory-budget", "lots"], 2, "--memory-budget"),
        (["--models-dir", "/no/such/folder"], 1, "--models-dir"),
    ],
)
def test_wrong_flags(flags: list[str], code: int, words: str) -> None:
    done = subprocess.run(
        command("--port", "0", "--engine", "fake", *flags),
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=False,
    )
    assert done.returncode == code
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# -- the registry ----------------------------------------------------------------------------------


def test_the_next_server_knows_the_models_of_the_last_one(own: Path, tmp_path: Path) -> None:
    env = environment(TINYOAI_HOME=str(tmp_path / "home"))
    with serve("--model", str(own / "a.gguf"), "--model-name", "org/mine", env=env) as server:
        number = server.get("/v1/models/org/mine").json["model_id"]
        assert number > 0
        assert (tmp_path / "home" / "registry.db").is_file()
    with serve(env=env) as server:
        cards = {card["id"]: card for card in server.get("/v1/models").json["data"]}
        assert list(cards) == ["tinyoai-chat", "org/mine"]
        assert cards["org/mine"]["model_id"] == number
        assert cards["org/mine"]["state"] == "unloaded"
        assert server.chat("Hello!", model="org/mine", max_tokens=3).json["model"] == "org/mine"


def test_a_name_for_the_built_in_model_lasts_one_run(tmp_path: Path) -> None:
    env = environment(TINYOAI_HOME=str(tmp_path / "home"))
    with serve("--model-name", "gpt-4", env=env) as server:
        assert server.say("Hello!", model="gpt-4")
        assert server.get("/v1/models/gpt-4").json["model_id"] is None
    with serve(env=env) as server:
        assert server.chat("Hello!", model="gpt-4").status == 404


def test_two_servers_share_one_registry(own: Path, tmp_path: Path) -> None:
    env = environment(TINYOAI_HOME=str(tmp_path / "home"))
    with serve("--engine", "fake", "--models-dir", str(own), env=env) as one, serve(env=env) as two:
        numbers = {card["id"]: card["model_id"] for card in one.get("/v1/models").json["data"]}
        others = {card["id"]: card["model_id"] for card in two.get("/v1/models").json["data"]}
        assert numbers["a"] == others["a"] != numbers["b"] == others["b"]
        assert two.chat("Hello!", model="b", max_tokens=3).json["model"] == "b"


@pytest.mark.parametrize("spoilt", ["text", "foreign", "unwritable"])
def test_an_unusable_registry_is_reported_and_the_server_runs(own: Path, tmp_path: Path, spoilt: str) -> None:
    home = tmp_path / "home"
    if spoilt == "unwritable":
        home.write_text("a file where the folder should be")
    else:
        home.mkdir()
        if spoilt == "text":
            (home / "registry.db").write_text("these are my notes, not a database\n" * 50)
        else:
            with sqlite3.connect(home / "registry.db") as database:
                database.execute("CREATE TABLE bookmarks (url)")
            database.close()
    env = environment(TINYOAI_HOME=str(home))
    with serve("--engine", "fake", "--models-dir", str(own), env=env) as server:
        assert server.say("hello") == "hello"
        assert server.say("hello", model="a") == "hello"
        whole = server.get("/v1/models/status").json
        assert str(home) in whole["registry"]["problem"]
        server.process.terminate()
        assert server.process.stderr is not None
        said = server.process.stderr.read()
        assert "nothing is registered beyond this run" in said
        assert "Traceback" not in said


def test_deleting_a_model_keeps_its_file(own: Path, tmp_path: Path) -> None:
    env = environment(TINYOAI_HOME=str(tmp_path / "home"))
    with serve("--engine", "fake", "--models-dir", str(own), env=env) as server:
        number = status(server, "a")["model_id"]
        reply = server.request("DELETE", "/v1/models/a")
        assert reply.status == 400
        assert "models folder" in reply.error["message"]
        assert status(server, "a")["model_id"] == number
        assert server.say("still here", model="a") == "still here"
    with serve("--engine", "fake", env=env) as server:
        assert server.say("hello", model="a") == "hello"
        deleted = server.request("DELETE", "/v1/models/a").json
        assert (deleted["id"], deleted["deleted"]) == ("a", True)
        assert server.chat("x", model="a").status == 404
        assert len(server.workers) == 1
        (own / "b.gguf").unlink()
        assert status(server, "b")["state"] == "missing"
        assert server.request("DELETE", "/v1/models/b").json == {
            "id": "b",
            "object": "model",
            "deleted": True,
        }
        assert [row["id"] for row in server.get("/v1/models/status").json["data"]] == ["fake"]
        assert server.request("DELETE", "/v1/models/b").status == 404
        assert server.request("DELETE", "/v1/models/fake").status == 400
    assert (own / "a.gguf").is_file()
