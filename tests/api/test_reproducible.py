"""The reproducible mode of a server: equal requests get equal answers in any company, and after a restart."""

import json
import random
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import architectures, fixtures, llama_server, serving

FLAGS = ["--engine", "llamacpp", "--threads", "1", "--ctx-size", "512", "--parallel", "4", "--reproducible"]
STEM = "Here is a list of facts about rivers, lakes, mountains and deserts of the world. " * 6


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    """Without the library the tests are skipped, or fail with CI=true."""
    if not llama_server.installed():
        fixtures.absent("xllamacpp is not installed: run `make test`")


QUESTIONS: list[dict[str, Any]] = [
    {"prompt": STEM + "The Nile is", "temperature": 0},
    {"prompt": STEM + "The Nile is", "temperature": 0.9, "seed": 5},
    {"prompt": STEM, "temperature": 1.2, "seed": 8},
    {"prompt": "Once", "temperature": 0},
]


def ask(server: serving.Server, question: dict[str, Any], *, stream: bool = False) -> list[Any]:
    """Returns the text and the log-probabilities of an answer."""
    reply = server.post("/v1/completions", **question, max_tokens=12, logprobs=2, stream=stream)
    assert reply.status == 200, reply.body
    if not stream:
        choice = reply.json["choices"][0]
        return [choice["text"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]]
    choices = [event["choices"][0] for event in reply.events if event != "[DONE]" and event["choices"]]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    return [
        "".join(choice["text"] for choice in choices),
        [value for part in parts for value in part["token_logprobs"]],
        [value for part in parts for value in part["top_logprobs"]],
    ]


@pytest.mark.parametrize("name", ["SmolLM2", "qwen2", "gemma3"])
def test_answers_do_not_depend_on_company_prefixes_streams_and_restarts(name: str) -> None:
    path = (
        fixtures.require(fixtures.smollm2(), "SmolLM2-135M-Instruct")
        if name == "SmolLM2"
        else architectures.model(name)
    )
    env = serving.environment()
    expected = []
    for question in QUESTIONS:  # each alone, in a new worker
        with serving.serve("--model", str(path), *FLAGS, env=env) as server:
            assert server.status()["reproducible"] is True
            expected.append(ask(server, question))
    assert len({json.dumps(each) for each in expected}) == len(QUESTIONS)
    draw = random.Random(3)
    with serving.serve("--model", str(path), *FLAGS, env=env) as server, ThreadPoolExecutor(4) as clients:

        def one(number: int, delay: float, stream: bool) -> None:
            threading.Event().wait(delay)
            assert ask(server, QUESTIONS[number], stream=stream) == expected[number], number

        numbers = [*range(len(QUESTIONS))] * 4
        draw.shuffle(numbers)
        jobs = [clients.submit(one, n, draw.random() / 2, draw.random() < 0.5) for n in numbers]
        for job in jobs:
            job.result()


def test_the_self_test_runs_once_for_a_model_and_machine(tmp_path: Path) -> None:
    path = architectures.model("qwen2")
    env = serving.environment()
    results = Path(env["TINYOAI_HOME"]) / "self-tests.json"
    with serving.serve("--model", str(path), *FLAGS, env=env):
        (key,) = json.loads(results.read_text())
    results.write_text(json.dumps({key: False}))
    with serving.serve("--model", str(path), *FLAGS, env=env) as server:
        assert server.status()["reproducible"] is False
        assert server.chat("hi", max_tokens=2).status == 200
    assert json.loads(results.read_text()) == {key: False}
    results.write_text("{")
    with serving.serve("--model", str(path), *FLAGS, env=env) as server:
        assert server.status()["reproducible"] is True
    assert json.loads(results.read_text()) == {key: True}


def test_a_settings_file_can_turn_it_on(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.symlink_to(architectures.model("qwen2"))
    path.with_suffix(".json").write_text('{"reproducible": true}')
    with serving.serve("--model", str(path), *FLAGS[:-1]) as server:
        assert server.status()["reproducible"] is True
    path.with_suffix(".json").write_text("{}")
    with serving.serve("--model", str(path), *FLAGS[:-1]) as server:
        assert server.status()["reproducible"] is False


def test_shared_cells_are_refused() -> None:
    done = subprocess.run(
        serving.command("--model", str(architectures.model("qwen2")), *FLAGS, "--kv", "unified"),
        capture_output=True,
        text=True,
        check=False,
        env=serving.environment(),
    )
    assert done.returncode == 2
    assert "leave out --kv unified" in done.stderr
