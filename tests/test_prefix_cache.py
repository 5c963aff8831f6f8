"""Conversations that outlive the server: a real server and a real model, stopped and started again."""

import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from tests import fixtures, llama_server
from tests.serving import Server, environment, serve

STORY = (
    "The lighthouse keeper counts the ships that pass in the night and writes their names in a book. " * 12
)
QUESTION = "Now count: one, two, three, four, five, six, seven, eight, nine, ten. Say it again."


@pytest.fixture
def model() -> Path:
    """SmolLM2."""
    if not llama_server.installed():
        fixtures.absent("xllamacpp is not installed: run `make test`")
    return fixtures.require(fixtures.smollm2(), "SmolLM2")


def ask(server: Server, messages: list[dict[str, str]], headers: dict[str, str] | None = None) -> Any:
    """Returns the answer to a conversation, of few tokens at temperature 0."""
    body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 12}
    reply = server.request("POST", "/v1/chat/completions", body, headers, timeout=120)
    assert reply.status == 200, reply.body
    return reply.json


def cached(answer: Any) -> tuple[int, int]:
    """Returns the tokens of an answer's prompt, and how many of them were not computed again."""
    usage = answer["usage"]
    assert answer["timings"]["cache_n"] == usage["prompt_tokens_details"]["cached_tokens"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def test_a_conversation_survives_a_restart(model: Path) -> None:
    env, cold = environment(), environment()
    flags = (
        "--model",
        str(model),
        "--model-name",
        "m",
        "--engine",
        "llamacpp",
        "--ctx-size",
        "1024",
        "--threads",
        "1",
    )
    messages = [{"role": "user", "content": STORY + "Who counts the ships?"}]
    with serve(*flags, env=env) as server:
        first = ask(server, messages)
        assert cached(first)[1] == 0
        longer = [
            *messages,
            {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
            {"role": "user", "content": QUESTION},
        ]
        untouched = ask(server, longer)  # from its slot
        assert server.stop() == 0
    folder = Path(env["TINYOAI_HOME"]) / "prefix-cache"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list(folder.glob("*.kv"))
    assert len(files) == 1
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in folder.iterdir())
    with serve(*flags, env=env) as server:
        warm = ask(server, longer)
        n_prompt, n_cached = cached(warm)
        assert n_prompt - 40 < n_cached < n_prompt
        assert warm["timings"]["cache_miss"] >= n_cached
        os.kill(server.workers[0], signal.SIGKILL)  # a crash loses nothing that was on disk
        assert cached(ask(server, longer))[1] > n_prompt - 40
    with serve(*flags, env=cold) as server:
        expected = ask(server, longer)
    assert cached(expected)[1] == 0
    # other cuts of the prompt change low bits, which do not matter for a clear answer
    answers = [reply["choices"][0]["message"]["content"] for reply in (warm, untouched, expected)]
    assert answers == [answers[0]] * 3


def test_prefixes_are_per_key_unless_they_are_shared(model: Path) -> None:
    flags = ("--model", str(model), "--model-name", "m", "--engine", "llamacpp", "--ctx-size", "1024", "--threads", "1",
             "--api-key", "sk-a", "--api-key", "sk-b")  # fmt: skip
    a, b = ({"authorization": f"Bearer sk-{name}"} for name in "ab")
    messages = [{"role": "user", "content": STORY}]
    env = environment()
    with serve(*flags, env=env) as server:
        assert cached(ask(server, messages, a))[1] == 0
        assert cached(ask(server, messages, b))[1] == 0
        answer = ask(server, messages, b)
        assert cached(answer)[1] > 200
        assert server.stop() == 0
    with serve(*flags, env=env) as server:
        assert cached(ask(server, messages, a))[1] > 200
    with serve(*flags, "--cache-shared", env=environment()) as server:
        assert cached(ask(server, messages, a))[1] == 0
        assert cached(ask(server, messages, b))[1] > 200
