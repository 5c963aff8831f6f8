"""tinyoai with llama.cpp against llama.cpp's own server: the same greedy tokens, log-probabilities and embeddings.

Both have one stream, one thread, the same chunks of the prompt and a KV cache of the same order. Then they run the
same operations in the same order, so a difference is an error of tinyoai's: a wrong position, a lost token, a row of another request.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests import architectures, fixtures, llama_server
from tests.llama_server import N_BATCH, LlamaServer
from tests.serving import Server, serve
from tinyoai import wire
from tinyoai.engine.contract import Row, Want
from tinyoai.engine.llamacpp.engine import LlamaCppEngine
from tinyoai.engine.llamacpp.opening import open_engine

N_TOKENS = 64
N_CTX = 2048
SMOLLM2 = "smollm2"
PROMPTS = {
    "short": "The capital of France is",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    # 1, 1, 2, 3, 5, 8 ...\n    return ",
    "unicode": "Z\u00fcrich \u4f60\u597d \N{GRINNING FACE} \u00bfqu\u00e9? \u041f\u0440\u0438\u0432\u0435\u0442, ",
    # longer than four steps of a prefill, and than the sliding window of gemma3
    "long": "The quick brown fox jumps over the lazy dog, and it writes a letter to 42 friends in Z\u00fcrich. "
    * 12,
}


def model(name: str) -> Path:
    """The file of a model."""
    if name == SMOLLM2:
        return fixtures.require(fixtures.smollm2(), "SmolLM2-135M-Instruct")
    return architectures.model(name)


def start_reference(path: Path, **options: Any) -> Any:
    """llama.cpp's server; without xllamacpp the test is skipped, or fails with CI=true."""
    if not llama_server.installed():
        fixtures.absent("xllamacpp is not installed: run `make test`")
    return llama_server.llama_server(path, n_ctx=N_CTX, **options)


def start_tinyoai(path: Path, *flags: str) -> Any:
    """tinyoai's server with one stream."""
    one_stream = ("--parallel", "1", "--threads", "1", "--batch-size", str(N_BATCH), "--ctx-size", str(N_CTX))
    return serve("--model", str(path), "--engine", "llamacpp", *one_stream, *flags)


class Pair(NamedTuple):
    """A model and the reference's server of it."""

    path: Path
    reference: LlamaServer


@pytest.fixture(scope="module", params=[SMOLLM2, *architectures.DECODERS])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Each model that generates."""
    path = model(request.param)
    with start_reference(path) as reference:
        yield Pair(path, reference)


@pytest.fixture(scope="module")
def engine(pair: Pair) -> Iterator[LlamaCppEngine]:
    """The model in this process."""
    opened = open_engine(
        wire.Load(
            path=str(pair.path),
            name="m",
            engine="llamacpp",
            n_ctx=N_CTX,
            n_slots=1,
            n_batch=N_BATCH,
            n_threads=1,
        )
    )
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def server(pair: Pair) -> Iterator[Server]:
    """The model in tinyoai's server."""
    with start_tinyoai(pair.path) as started:
        yield started


class Step(NamedTuple):
    """A greedy token, and the log-probabilities of the five likeliest tokens."""

    token: int
    likeliest: list[float]


def greedy(engine: LlamaCppEngine, ids: list[int], n: int) -> list[Step]:
    """The continuation of a prompt; it ends after a token that ends the answer."""
    engine.truncate(0, 0)
    for at in range(0, len(ids), N_BATCH):
        last = at + N_BATCH >= len(ids)
        engine.eval([Row(0, ids[at : at + N_BATCH], at, Want.LAST if last else Want.NOTHING)])
    steps: list[Step] = []
    while True:
        logits = np.array(engine.logits_list(0))
        largest = logits.max()
        order = np.argsort(-logits, kind="stable")[:5]
        log_sum = largest + math.log(np.exp(logits - largest).sum())
        token = int(order[0])
        steps.append(Step(token, [float(logits[i] - log_sum) for i in order]))
        if len(steps) == n or token in engine.info.eog_ids:
            return steps
        engine.eval([Row(0, [token], len(ids) + len(steps) - 1)])


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_engine_writes_the_same_tokens(pair: Pair, engine: LlamaCppEngine, kind: str) -> None:
    ids = pair.reference.post("/tokenize", content=PROMPTS[kind], add_special=True)["tokens"]
    assert kind != "long" or len(ids) > 4 * N_BATCH
    expected = pair.reference.complete(ids, N_TOKENS)
    steps = greedy(engine, ids, N_TOKENS)
    assert [step.token for step in steps] == expected["tokens"]
    # an answer of a few tokens would compare little
    assert len(steps) == N_TOKENS
    # the reference leaves out tokens that end within a character
    rows = expected["completion_probabilities"]
    assert len(rows) > N_TOKENS // 2
    left = iter(steps)
    for row in rows:
        reference = sorted((each["logprob"] for each in row["top_logprobs"]), reverse=True)
        near = pytest.approx(reference, abs=1e-3)
        assert any(step.token == row["id"] and step.likeliest == near for step in left), row


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_server_writes_the_same_text(pair: Pair, server: Server, kind: str) -> None:
    expected = pair.reference.complete(PROMPTS[kind], N_TOKENS)
    reply = server.post(
        "/v1/completions", prompt=PROMPTS[kind], temperature=0, max_tokens=N_TOKENS, logprobs=5
    ).json
    (choice,) = reply["choices"]
    assert reply["usage"]["prompt_tokens"] == expected["tokens_evaluated"]
    assert reply["usage"]["completion_tokens"] == expected["tokens_predicted"] == N_TOKENS
    assert choice["text"] == expected["content"]
    rows = expected["completion_probabilities"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([row["logprob"] for row in rows], abs=1e-3)
