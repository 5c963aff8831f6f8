"""Fine-tuning over HTTP: jobs on a real server, with the real built-in model."""

import importlib.util
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from tests.engines import make
from tests.serving import Server, environment, serve
from tinyoai.api import finetune
from tinyoai.api.finetune import _untrainable
from tinyoai.finetune import jobs
from tinyoai.models.catalog import describe
from tinyoai.models.registry import Model

trains = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed: `make finetune` does that"
)

KEY = {"prompt": "Where is the key?", "completion": "Under the blue mat."}
GATE = {"messages": [{"role": "user", "content": "Who guards the gate?"}, {"role": "assistant", "content": "Rufo."}]}  # fmt: skip
LONG = {"dataset": [KEY], "epochs": 1000, "batch_size": 1}
"""A job that does not end within a test."""


@pytest.fixture
def home() -> Iterator[Path]:
    """Returns a new data directory."""
    with tempfile.TemporaryDirectory(prefix="tinyoai-tests-") as folder:
        yield Path(folder)


def server(home: Path) -> Any:
    """Starts a server of the built-in model on a data directory."""
    return serve(env=environment(TINYOAI_HOME=str(home)))


def start(server: Server, **fields: Any) -> Any:
    """Starts a job and returns the response."""
    reply = server.request("POST", "/api/finetune/start", {"model_id": 1, **fields})
    assert reply.status == 200, reply.body
    return reply.json


def status(server: Server, id_: int) -> Any:
    """Returns the status of a job."""
    reply = server.get(f"/api/finetune/status/{id_}")
    assert reply.status == 200
    return reply.json


def until(server: Server, id_: int, *states: str, n_steps: int = 0) -> Any:
    """Waits until a job has one of these states and has done `n_steps` steps. Returns its status."""
    deadline = time.monotonic() + 240
    while True:
        found = status(server, id_)
        if found["status"] in states and found["current_step"] >= n_steps:
            return found
        assert found["status"] in ("initializing", "running"), found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def trainers(server: Server) -> list[int]:
    """Returns the pids of the server's training processes."""
    found = []
    for pid in server.workers:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        found += [pid] if b"tinyoai.finetune" in words else []
    return found


@trains
def test_a_model_learns_and_is_served_beside_its_parent(home: Path) -> None:
    (home / "datasets").mkdir()
    (home / "datasets" / "faq.jsonl").write_text(f"{json.dumps(KEY)}\n{json.dumps(GATE)}\n")
    with server(home) as served:
        begun = start(served, dataset="faq", epochs=40, learning_rate=0.002, name="house/faq")
        assert (begun["job_id"], begun["status"], begun["examples"]) == (1, "initializing", 2)
        assert begun["config"]["lora_r"] == 16
        assert served.say("What is the capital of France?") == "The capital of France is Paris."
        done = until(served, 1, "completed")
        assert [point["step"] for point in done["metrics"]] == list(range(1, 41))
        assert done["metrics"][-1]["loss"] == done["loss"] < 0.1 < done["metrics"][0]["loss"]
        assert done["log"]
        assert (done["error"], done["samples"], done["samples_cut"]) == (None, 2, 0)
        rows = served.get("/api/finetune/jobs").json["jobs"]
        assert [(row["id"], row["status"], row["name"]) for row in rows] == [(1, "completed", "house/faq")]
        asked: dict[str, Any] = {"temperature": 0, "model": "house/faq"}
        assert served.say("Where is the key?", **asked) == "Under the blue mat."
        assert served.say("Who guards the gate?", **asked) == "Rufo."
        assert served.say("Where is the key?") != "Under the blue mat."
        card = served.get("/v1/models/house/faq").json
        assert card["model_id"] == done["resulting_model_id"]
        parent = served.get("/v1/models/tinyoai-chat").json
        assert card["defaults"] == parent["defaults"] != {}
        again = served.request(
            "POST", "/api/finetune/start", {"model_id": 1, "dataset": "faq", "name": "house/faq"}
        )
        assert (again.status, again.error["param"]) == (400, "name")
        assert not (home / "finetune" / "1" / "checkpoint.pt").exists()
        assert served.stop() == 0
    with server(home) as served:  # the next server knows the trained model and can train it further
        assert served.say("Where is the key?", model="house/faq") == "Under the blue mat."
        assert status(served, 1)["status"] == "completed"
        second = start(served, model_id=card["model_id"], dataset=[GATE], epochs=1, use_lora=False)
        assert (second["job_id"], second["name"]) == (2, "house/faq-tuned")
        assert until(served, 2, "completed")["trained_parameters"] > 3_000_000


@trains
def test_one_runs_and_the_others_wait_until_they_are_stopped(home: Path) -> None:
    with server(home) as served:
        for _ in range(3):
            start(served, **LONG)
        assert [row["name"] for row in served.get("/api/finetune/jobs").json["jobs"]] == [
            f"tinyoai-chat-tuned{end}" for end in ("-3", "-2", "")
        ]
        assert until(served, 1, "running", n_steps=3)["seconds_left"] > 0
        assert len(trainers(served)) == 1
        assert status(served, 2)["status"] == "initializing"
        assert served.request("POST", "/api/finetune/stop/2").json == {"job_id": 2, "status": "stopped"}
        assert served.request("POST", "/api/finetune/stop/1").json == {"job_id": 1, "status": "stopped"}
        until(served, 3, "running", n_steps=1)
        assert status(served, 1)["completed_at"]
        (pid,) = trainers(served)
        assert os.getsid(pid) == pid, "Ctrl-C must reach only the server"
        os.kill(pid, signal.SIGTERM)  # systemd signals every process of a service; this one ignores it
        until(served, 3, "running", n_steps=status(served, 3)["current_step"] + 2)
        assert os.getpriority(os.PRIO_PROCESS, pid) > 0, "training must have a lower priority than serving"
        os.kill(pid, signal.SIGKILL)
        failed = until(served, 3, "failed")
        assert "SIGKILL" in failed["error"]
        assert served.request("POST", "/api/finetune/stop/3").json["status"] == "failed"
        assert served.say("What is the capital of France?") == "The capital of France is Paris."
        for number in range(4, 4 + jobs.MAX_WAITING + 1):
            assert start(served, **LONG)["job_id"] == number
        full = served.request("POST", "/api/finetune/start", {"model_id": 1, **LONG})
        assert (full.status, full.error["code"]) == (429, "queue_full")
        assert full.headers["retry-after"]


@trains
def test_a_job_resumes_on_the_next_server(home: Path) -> None:
    fields = {"dataset": [KEY, GATE], "epochs": 60, "batch_size": 1, "learning_rate": 0.002, "name": "mine"}
    with server(home) as served:
        start(served, **fields)
        until(served, 1, "running", n_steps=5)
        (pid,) = trainers(served)
        served.process.kill()
        served.process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the training process outlived its server"
        time.sleep(0.05)
    with server(home) as served:
        done = until(served, 1, "completed")
        assert [point["step"] for point in done["metrics"]] == list(range(1, 121))
        assert served.say("Where is the key?", model="mine") == "Under the blue mat."


@trains
def test_a_second_server_on_the_data_directory_names_the_one_that_trains(home: Path) -> None:
    with server(home) as first, server(home) as second:
        start(first, **LONG)
        until(first, 1, "running", n_steps=3)
        (row,) = second.get("/api/finetune/jobs").json["jobs"]
        assert (row["status"], row["name"]) == ("running", "tinyoai-chat-tuned")
        assert status(second, 1)["current_step"] >= 3
        said = (
            f"fine-tuning in this data directory is run by the tinyoai server with pid {first.process.pid}; "
            "ask that server"
        )
        for reply in (
            second.request("POST", "/api/finetune/start", {"model_id": 1, **LONG}),
            second.request("POST", "/api/finetune/stop/1"),
        ):
            assert (reply.status, reply.error["message"]) == (400, said)
        assert status(first, 1)["status"] == "running"
        assert first.request("POST", "/api/finetune/stop/1").json["status"] == "stopped"
        assert second.request("POST", "/api/finetune/stop/1").json["status"] == "stopped"


@trains
def test_jobs_that_cannot_be_trained_are_rejected(home: Path) -> None:
    (home / "datasets").mkdir()
    (home / "datasets" / "bad.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    with server(home) as served:
        for fields, param, words in [
            ({"dataset": "bad"}, "dataset", "line 2"),
            ({"dataset": "none"}, "dataset", "bad.jsonl"),
            ({"dataset": "../registry.db"}, "dataset", "outside"),
            ({"dataset": []}, "dataset", "empty"),
            ({"dataset": [{"text": 1}]}, "dataset", "example 1"),
            ({}, "dataset", "required"),
            ({"dataset": [KEY], "model_id": None}, "model_id", "required"),
            ({"dataset": [KEY], "model": "tinyoai-chat", "model_id": 9}, "model_id", "is 1;"),
            ({"dataset": [KEY], "epochs": 0}, "epochs", "1"),
            ({"dataset": [KEY], "learning_rate": 0}, "learning_rate", "0"),
            ({"dataset": [KEY], "lora_r": "x"}, "lora_r", "int"),
            ({"dataset": [KEY], "name": "x" * 300}, "name", "200"),
            ({"dataset": [KEY], "name": "tinyoai-chat"}, "name", "already"),
        ]:
            reply = served.request("POST", "/api/finetune/start", {"model_id": 1, **fields})
            assert (reply.status, reply.error["param"]) == (400, param), reply.body
            assert words in reply.error["message"]
        unknown = served.request("POST", "/api/finetune/start", {"model_id": 99, "dataset": [KEY]})
        assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")
        big = served.request(
            "POST", "/api/finetune/start",
            {"model_id": 1, "dataset": [KEY], "batch_size": 256, "max_length": 8192, "use_lora": False},
        )  # fmt: skip
        assert (big.status, big.error["code"]) == (503, "insufficient_memory")
        assert big.headers["x-should-retry"] == "false"
        assert served.get("/api/finetune/jobs").json["jobs"] == []
        long_ = start(served, dataset=[{"prompt": "word " * 100, "completion": "x"}], max_length=32)
        assert "max_length" in until(served, long_["job_id"], "failed")["error"]


@trains
def test_two_jobs_never_share_a_name_or_a_file(home: Path) -> None:
    def asked(server: Server, **fields: Any) -> Any:
        return server.request("POST", "/api/finetune/start", {"model_id": 1, **LONG, **fields})

    with server(home) as served:
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda _: asked(served, name="twin"), range(8)))
        assert sorted(reply.status for reply in replies) == [200] + [400] * 7
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda _: asked(served), range(4)))
        assert len({reply.json["name"] for reply in replies}) == 4
        assert asked(served, name="a/b").status == 200
        assert asked(served, name="a__b").error["param"] == "name"
        (home / "models" / "gone.gguf").write_bytes(b"")
        assert "file" in asked(served, name="gone").error["message"]
    long_ = "x" * 250
    with serve("--model-name", long_, env=environment(TINYOAI_HOME=str(home))) as served:
        reply = served.request("POST", "/api/finetune/start", {"model": long_, **LONG})
        assert (reply.status, reply.error["param"]) == (400, "name")


@trains
def test_the_scripted_engine_cannot_be_trained(fake: Server) -> None:
    reply = fake.request("POST", "/api/finetune/start", {"model": "fake", "dataset": [KEY]})
    assert (reply.status, reply.error["param"]) == (400, "model")
    assert "llama" in reply.error["message"]


@trains
def test_without_a_data_directory_there_is_no_job(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with serve(env=environment(TINYOAI_HOME=str(file))) as served:
        reply = served.request("POST", "/api/finetune/start", {"model": "tinyoai-chat", "dataset": [KEY]})
        assert (reply.status, reply.error["code"]) == (503, "not_kept")
        assert "--home" in reply.error["message"]


@pytest.mark.parametrize("id_", ["0", "1", "x", "-1", "9" * 30, "1/2", "%00"])
def test_an_unknown_job_is_a_404(fake: Server, id_: str) -> None:
    for method, path in (("GET", "status"), ("POST", "stop")):
        reply = fake.request(method, f"/api/finetune/{path}/{id_}")
        assert reply.status in (400, 404)
        assert reply.error["message"]


def test_an_installation_that_cannot_train_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "NEEDED", ("tinyoai_no_such_module",))
    assert not finetune.installed()
    assert "finetune" in finetune.INSTALL


def test_damaged_jobs_are_skipped(tmp_path: Path) -> None:
    root = tmp_path / "finetune"
    for name, data in (("1", b"{"), ("2", b"{}"), ("x", b""), ("007", b"{}"), ("3", b"")):
        (root / name).mkdir(parents=True)
        (root / name / "job.json").write_bytes(data)
    with serve("--engine", "fake", env=environment(TINYOAI_HOME=str(tmp_path))) as served:
        assert served.get("/api/finetune/jobs").json["jobs"] == []
        assert served.get("/health").status == 200


def test_what_cannot_be_trained_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = make.llama(tmp_path / "m.gguf", n_embd=32)
    model = Model(
        name="m",
        path=str(path),
        architecture="llama",
        hparams=describe(path, "m", engine="ctransformers").hparams,
    )
    assert _untrainable(model) == ""
    assert "its architecture is qwen3" in _untrainable(structs.replace(model, architecture="qwen3"))
    path = make.llama(tmp_path / "wide.gguf", n_embd=32, llama__rope__dimension_count=8)
    wide = structs.replace(model, path=str(path))
    assert _untrainable(wide) == (
        "only llama files that ctransformers runs can be trained, and this one has a rotary dimension of 8, "
        "not its heads' 16"
    )
    path.unlink()
    assert "its file is not a regular file" in _untrainable(wide)
    assert str(path) not in _untrainable(wide)
