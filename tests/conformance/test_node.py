"""OpenAI's SDK for Node, and fetch, against a real server."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import clients
from tests.serving import Server, serve

PARIS = "The capital of France is Paris."


@pytest.fixture
def mine() -> Iterator[Server]:
    """A server of the built-in model under another name."""
    with serve("--model-name", "my-model") as server:
        yield server


def test_node(mine: Server) -> None:
    node_modules = clients.node_modules()
    script = Path(__file__).with_name("client.cjs")
    done = subprocess.run(
        ["node", str(script), mine.url, "my-model", "my-model"],
        capture_output=True, text=True, timeout=120, env=clients.quiet_environment(NODE_PATH=node_modules),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["whole"] == found["streamed"] == found["helper"] == PARIS
    assert found["usage"]["completion_tokens"] == found["streamUsage"]["completion_tokens"] > 5
    assert found["completion"] == " jumps over the lazy dog."
    assert found["models"] == ["my-model"]
    assert found["card"] == "model"
    assert found["dimensions"] == 256
    assert found["difference"] < 1e-6
    unknown = found["unknown"]
    assert (unknown["name"], unknown["status"], unknown["code"]) == ("NotFoundError", 404, "model_not_found")
    assert unknown["id"]
    assert found["wrong"]["name"] == "BadRequestError"
    assert found["fetch"]["status"] == 200
    assert found["fetch"]["type"] == "text/event-stream; charset=utf-8"
    assert found["fetch"]["text"].endswith("data: [DONE]\n\n")
