"""The calls that four other systems document, sent with curl and their own model names.

The answers must be correct, not only well-formed. Examples of the same systems for Python, LangChain and Node are
in `clients/` and `test_node.py`.
"""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.serving import Server, command, environment, serve
from tinyoai.finetune.jobs import installed

PARIS = "The capital of France is Paris."
NPU = "An NPU, a neural processing unit, is a chip"


@pytest.fixture(scope="module")
def llama() -> Iterator[Server]:
    """A server of the built-in model with the name and the key on SMG's page."""
    with serve("--model-name", "meta-llama/Llama-3.1-8B-Instruct", "--api-key", "your-api-key") as server:
        yield server


@pytest.fixture(scope="module")
def mine() -> Iterator[Server]:
    """A server of the built-in model under the name that NPU-Stack's page uses."""
    with serve("--model-name", "my-model") as server:
        yield server


def curl(server: Server, path: str, body: Any = None, *flags: str) -> str:
    """Runs curl and returns its output."""
    ask = ["-H", "Content-Type: application/json", "-d", json.dumps(body)] if body is not None else []
    done = subprocess.run(
        ["curl", "-sS", *flags, f"{server.url}{path}", *ask],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


# -- Smartloop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slp-orchestra-mini", "gemma3-1b"])
def test_smartloop_s_pages(name: str) -> None:
    with serve("--model-name", name) as server:
        whole = json.loads(
            curl(
                server,
                "/chat/completions",
                {"model": name, "messages": [{"role": "user", "content": "What is the capital of France?"}]},
            )
        )
        assert whole["id"].startswith("chatcmpl-")
        assert whole["object"] == "chat.completion"
        choice = whole["choices"][0]
        assert (choice["index"], choice["finish_reason"]) == (0, "stop")
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"] == PARIS


# -- SMG -------------------------------------------------------------------------------------------------

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
BEARER = ("-H", "Authorization: Bearer your-api-key")


def test_smg_s_chat(llama: Server) -> None:
    body = {
        "model": LLAMA,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        "max_tokens": 100,
        "temperature": 0.7,
    }
    whole = json.loads(curl(llama, "/chat/completions", body, *BEARER))
    assert whole["choices"][0]["message"]["content"] == PARIS
    assert whole["model"] == LLAMA
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] > 5


def test_smg_s_stream(llama: Server) -> None:
    printed = curl(
        llama,
        "/chat/completions",
        {"model": LLAMA, "messages": [{"role": "user", "content": "Hello"}], "stream": True},
        "-N",
        *BEARER,
    )
    *events, done = [line.removeprefix("data: ") for line in printed.split("\n\n") if line]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks).startswith("Hello!")
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}


def test_smg_s_completion(llama: Server) -> None:
    whole = json.loads(
        curl(
            llama,
            "/completions",
            {"model": LLAMA, "prompt": "The quick brown fox", "max_tokens": 50},
            *BEARER,
        )
    )
    assert whole["choices"][0]["text"] == " jumps over the lazy dog."
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["object"] == "text_completion"


def test_smg_s_models_and_errors(llama: Server) -> None:
    (card,) = json.loads(curl(llama, "/models", None, *BEARER))["data"]
    assert json.loads(curl(llama, f"/models/{LLAMA}", None, *BEARER)) == card
    assert json.loads(curl(llama, f"/models/{LLAMA.replace('/', '%2F')}", None, *BEARER)) == card
    assert card["id"] == LLAMA
    assert card["object"] == "model"
    assert isinstance(card["created"], int)
    assert isinstance(card["owned_by"], str)
    for flags, path, body, status, kind in (
        ((), "/models", None, 401, "authentication_error"),
        (("-H", "Authorization: Bearer wrong"), "/models", None, 401, "authentication_error"),
        (BEARER, "/models/none", None, 404, "not_found_error"),
        (BEARER, "/nowhere", None, 404, "not_found_error"),
        (BEARER, "/chat/completions", {"model": LLAMA}, 400, "invalid_request_error"),
        (
            BEARER,
            "/chat/completions",
            {"model": "other", "messages": [{"role": "user", "content": "x"}]},
            404,
            "not_found_error",
        ),
    ):
        printed = curl(llama, path, body, *flags, "-w", "\n%{http_code}")
        text, _, code = printed.rpartition("\n")
        error = json.loads(text)["error"]
        assert (int(code), error["type"]) == (status, kind)
        assert error["message"]
        assert "code" in error


def test_smg_s_request_id(llama: Server) -> None:
    printed = curl(llama, "/models", None, "-i", "-H", "X-Request-ID: trace-42", *BEARER)
    assert "x-request-id: trace-42" in printed.lower().splitlines()


# -- NPU-Stack -------------------------------------------------------------------------------------------


def test_npu_stack_s_chat(mine: Server) -> None:
    body = {
        "model": "my-model",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is an NPU?"},
        ],
        "temperature": 0.7,
        "max_tokens": 256,
    }
    whole = json.loads(curl(mine, "/chat/completions", body))
    assert whole["choices"][0]["message"]["content"].startswith(NPU)


def test_npu_stack_s_models(mine: Server) -> None:
    (card,) = json.loads(curl(mine, "/models"))["data"]
    assert card["id"] == "my-model"
    loaded = json.loads(curl(mine, "/models/load", {"name": "my-model"}))
    assert loaded["status"] == "already_loaded"
    assert json.loads(curl(mine, "/models/unload", {"name": "my-model"}))["status"] == "unloaded"
    assert json.loads(curl(mine, "/models/load", {"name": "my-model"}))["status"] == "loaded"
    text = curl(mine, "/models/status")
    assert "my-model" in text
    assert "uptime" in text


@pytest.mark.skipif(not installed(), reason="torch is not installed: `make finetune` does that")
def test_npu_stack_s_fine_tuning(tmp_path: Path) -> None:
    folder = tmp_path / "datasets"
    folder.mkdir()
    (folder / "tickets.jsonl").write_text('{"instruction": "Say hello.", "output": "Hello there."}\n' * 8)
    with serve(env=environment(TINYOAI_HOME=str(tmp_path))) as server:
        asked = {
            "model_id": server.get("/v1/models").json["data"][0]["model_id"],
            "dataset": "tickets",
            "epochs": 3,
            "batch_size": 4,
            "learning_rate": 2e-4,
            "use_lora": True,
            "lora_r": 16,
            "lora_alpha": 32,
        }
        begun = server.request("POST", "/api/finetune/start", asked).json
        assert begun["status"] == "initializing"
        assert {name: begun["config"][name] for name in list(asked)[2:]} == dict(list(asked.items())[2:])
        seen, deadline = {"initializing"}, time.monotonic() + 120
        while not seen & {"completed", "failed"}:
            assert time.monotonic() < deadline
            (row,) = server.get("/api/finetune/jobs").json["jobs"]
            assert row["id"] == begun["job_id"]
            seen.add(row["status"])
            time.sleep(0.02)
        assert "failed" not in seen
        found = server.get(f"/api/finetune/status/{begun['job_id']}").json
        assert [point["step"] for point in found["metrics"]] == [1, 2, 3, 4, 5, 6]
        assert all(point["loss"] > 0 and point["learning_rate"] > 0 for point in found["metrics"])
        assert found["log"]


def test_the_commands_of_smartloop_s_and_the_snaps_pages(tmp_path: Path) -> None:
    env = environment(TINYOAI_HOME=str(tmp_path))

    def tinyoai(*words: str) -> str:
        return subprocess.run(
            command(*words), capture_output=True, text=True, timeout=60, check=True, env=env
        ).stdout

    shown = dict(line.split(maxsplit=1) for line in tinyoai("get", "http").splitlines() if " " in line)
    assert (shown["http.host"], shown["http.port"]) == ("127.0.0.1", "8000")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tinyoai("set", f"http.port={port}")
    try:
        assert f"http://127.0.0.1:{port}/v1" in tinyoai("agent", "start")
        table = tinyoai("status")
        for name in ("Server", "PID", "Model loaded", "Quantization", "Context window", "Flash attention",
                     "Model size", "Memory usage", "GPU"):  # fmt: skip
            assert f"| {name} " in table
        asked = {
            "model": "tinyoai-chat",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
        answer = urlopen(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(asked).encode())
        with answer:
            said = json.load(answer)
        assert said["choices"][0]["message"]["content"] == PARIS
    finally:
        tinyoai("agent", "stop")


# -- inference snaps -------------------------------------------------------------------------------------


def test_the_inference_snaps_page(mine: Server) -> None:
    model = json.loads(curl(mine, "/models"))["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": "Hi there!"}], "temperature": 0.7}
    whole = json.loads(curl(mine, "/chat/completions", body))
    assert whole["choices"][0]["message"]["content"] == "Hello! How can I help you today?"
    assert whole["system_fingerprint"]
    timings = whole["timings"]
    assert {
        "cache_n", "cache_miss", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second",
        "predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second",
    } == set(timings)  # fmt: skip
    assert timings["predicted_n"] == whole["usage"]["completion_tokens"]
    assert timings["prompt_n"] + timings["cache_n"] == whole["usage"]["prompt_tokens"]
    assert timings["predicted_per_second"] == pytest.approx(
        1000 * timings["predicted_n"] / timings["predicted_ms"]
    )
    assert timings["prompt_per_token_ms"] == pytest.approx(timings["prompt_ms"] / timings["prompt_n"])
