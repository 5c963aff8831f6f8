"""Real clients and real servers: curl, clients in their own environments, every kind of model, dying workers.

The tests of each client are in `clients/NAME` and run with pytest in `.venv-conformance/NAME`.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from tests import clients
from tests.engines import make
from tests.serving import PYTHON, Reply, Server, serve, wait_until

FRANCE = "What is the capital of France?"


@pytest.mark.parametrize("name", ["openai", "langchain-openai", "schemathesis"])
def test_a_client_in_its_own_environment(name: str) -> None:
    done = subprocess.run(
        [clients.python(name), "-m", "pytest", "-p", "no:cacheprovider", f"tests/conformance/clients/{name}"],
        cwd=clients.ROOT,
        env=clients.quiet_environment(SERVER_PYTHON=PYTHON),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_temperature_0_and_seeds_repeat(builtin: Server) -> None:
    for fields in ({"temperature": 0}, {"seed": 9}, {"seed": 9, "temperature": 1.5, "top_k": 50}):
        texts = set()
        for _ in range(3):
            reply = builtin.chat("Tell me a short story about a fox.", **fields)
            texts.add(reply.json["choices"][0]["message"]["content"])
            builtin.chat("Something else in between, to fill the caches.")
        assert len(texts) == 1, fields


def test_seeds_repeat_under_load(builtin: Server) -> None:
    found: list[str] = []

    def ask(number: int) -> None:
        fields = {"seed": 77} if number % 2 else {"seed": number}
        reply = builtin.chat("Tell me a short story about a wolf.", **fields)
        if number % 2:
            found.append(reply.json["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1


def test_cached_tokens_are_reported(builtin: Server) -> None:
    messages = [{"role": "user", "content": "Tell me what you know about " + "very " * 40 + "old trees."}]
    builtin.post("/v1/chat/completions", messages=messages, temperature=0)
    usage = builtin.post("/v1/chat/completions", messages=messages, temperature=0).json["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert usage["prompt_tokens"] // 2 < cached < usage["prompt_tokens"]


def test_no_answer_begins_with_a_stray_space(builtin: Server) -> None:
    for question in ("Hello!", FRANCE, "What is 2 + 3?", "Tell me a story."):
        for stream in (False, True):
            reply = builtin.chat(question, stream=stream)
            if stream:
                said = "".join(
                    e["choices"][0]["delta"].get("content", "") for e in reply.events if isinstance(e, dict)
                )
            else:
                said = reply.json["choices"][0]["message"]["content"]
            assert said == said.lstrip()


CURL = r"""curl -sN {url}/chat/completions \
-H "Content-Type: application/json" \
-d '{{
"model": "{model}",
"messages": [
{{"role": "user", "content": "What is the capital of France?"}}
], "temperature": 0
}}'"""


def test_curl_as_pasted() -> None:
    assert shutil.which("curl")
    with serve("--model-name", "slp-orchestra-mini") as server:
        done = subprocess.run(
            CURL.format(url=server.url, model="slp-orchestra-mini"),
            shell=True,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert (
            json.loads(done.stdout)["choices"][0]["message"]["content"] == "The capital of France is Paris."
        )


def test_curl_shows_tokens_as_they_arrive(builtin: Server) -> None:
    body = {
        "model": "tinyoai-chat",
        "stream": True,
        "messages": [{"role": "user", "content": "Tell me a story."}],
    }
    process = subprocess.Popen(
        ["curl", "-sN", f"{builtin.url}/chat/completions", "-d", json.dumps(body)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = [line for line in process.stdout if line.strip()]
    assert process.wait() == 0
    process.stdout.close()
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]\n"


# -- models of every kind ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maker", "flags", "template"),
    [
        (make.llama, [], "plain"),
        (make.falcon, [], "plain"),
        (make.gpt2_ggml, ["--model-type", "gpt2"], "alpaca"),
    ],
)
def test_models_of_every_kind_are_served(tmp_path: Path, maker: Any, flags: list[str], template: str) -> None:
    path = maker(tmp_path / "some-model.bin")
    with serve("--model", str(path), *flags, "--chat-template", template) as server:
        assert server.model == "some-model"
        body = server.chat("hello", max_tokens=9, temperature=0, ignore_eos=True).json
        assert body["usage"]["completion_tokens"] == 9
        again = server.chat("hello", max_tokens=9, temperature=0, ignore_eos=True).json
        assert again["choices"] == body["choices"]
        body = server.post("/v1/completions", prompt="hello", max_tokens=4, echo=True, logprobs=2).json
        assert body["choices"][0]["text"].startswith("hello")
        assert body["choices"][0]["logprobs"]["token_logprobs"][0] is None
        assert all(p < 0 for p in body["choices"][0]["logprobs"]["token_logprobs"][1:])
        reply = server.chat("x" * 5000)
        assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")


def test_a_flood_of_connections_does_not_cost_the_open_ones() -> None:
    with serve("--engine", "fake", prefix=["prlimit", "--nofile=128:128"]) as server:
        held = server.connect()
        flood = [server.connect() for _ in range(150)]
        held.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert held.recv(100).startswith(b"HTTP/1.1 200")
        for sock in [held, *flood]:
            sock.close()
        assert server.say("still here") == "still here"


# -- a worker that dies --------------------------------------------------------------------------------


def test_requests_that_kill_their_workers_do_not_disable_the_model() -> None:
    with serve("--engine", "fake") as server:
        for n in range(4):
            reply = server.chat('!{"text": "abc", "kill_at": 1}')
            assert (reply.status, reply.error["code"]) == (500, "worker_died")
            assert reply.headers["x-should-retry"] == "false"
            assert server.say(f"after {n + 1} deaths") == f"after {n + 1} deaths"
        assert server.get("/health").json["status"] == "ok"


def test_a_request_that_was_not_started_survives_its_worker() -> None:
    with serve("--engine", "fake", "--parallel", "1") as server:
        replies: dict[str, Reply] = {}

        def ask(name: str, script: str) -> None:
            replies[name] = server.chat(script)

        threads = []
        for n, (name, script) in enumerate(
            [
                ("running", '!{"text": "x", "repeat": 3500, "step_ms": 20}'),
                # the worker may tokenize the next request ahead, and then it counts as started
                ("next", "perhaps"),
                ("last", "patience"),
            ]
        ):
            threads.append(threading.Thread(target=ask, args=(name, script)))
            threads[-1].start()
            wait_until(lambda n=n: (s := server.status())["slots"]["busy"] == 1 and s["queue"] == n)
        os.kill(server.workers[0], signal.SIGKILL)
        for thread in threads:
            thread.join(30)
        assert replies["running"].error["code"] == "worker_died"
        assert replies["last"].json["choices"][0]["message"]["content"] == "patience"


def test_the_server_logs_no_prompts() -> None:
    with serve("--engine", "fake", "--log-level", "debug") as server:
        server.chat("a very private question")
        server.chat('!{"text": "abc", "nan_at": 1}')
        server.stop()
        assert server.process.stderr is not None
        log = server.process.stderr.read()
        assert "private" not in log
        assert re.search(r"POST /v1/chat/completions 200", log)
