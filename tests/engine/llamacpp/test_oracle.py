"""tinyoai with llama.cpp against llama.cpp's own server: the same greedy tokens, log-probabilities and embeddings.

Both have one stream, one thread, the same steps of a prefill and KV cells in the same order. So they compute the same,
and a difference is an error of tinyoai: a wrong position, a lost token, the output of another row.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests import architectures, fixtures, llama_server
from tests.llama_server import LlamaServer
from tests.serving import Server, serve
from tinyoai import wire
from tinyoai.engine.contract import Row, Want
from tinyoai.engine.llamacpp.engine import LlamaCppEngine
from tinyoai.engine.llamacpp.opening import open_engine

N_TOKENS = 64
N_CTX = 2048
N_BATCH = 64
"""Tokens of a prefill step, as tinyoai's default. From 64 on llama.cpp computes attention in another way."""
N_SMALL_BATCH = 32
"""The server cuts prompts by measured time too. Below 64 tokens the place of a cut does not change results."""
SMOLLM2 = "smollm2"
PROMPTS = {
    # longer than four steps of a prefill, and than the sliding window of gemma3
    "long": "The quick brown fox jumps over the lazy dog, and it writes a letter to 42 friends in Z\u00fcrich. "
    * 12,
    "short": "The capital of France is",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    # 1, 1, 2, 3, 5, 8 ...\n    return ",
    "unicode": "Z\u00fcrich \u4f60\u597d \N{GRINNING FACE} \u00bfqu\u00e9? \u041f\u0440\u0438\u0432\u0435\u0442, ",
}


def model(name: str) -> Path:
    """The file of a model."""
    if name == SMOLLM2:
        return fixtures.require(fixtures.smollm2(), "SmolLM2-135M-Instruct")
    return architectures.model(name)


def start_reference(path: Path, *, n_batch: int = N_BATCH, **options: Any) -> Any:
    """llama.cpp's server; without xllamacpp the test is skipped, or fails with CI=true."""
    if not llama_server.installed():
        fixtures.absent("xllamacpp is not installed: run `make test`")
    return llama_server.llama_server(path, n_ctx=N_CTX, n_batch=n_batch, **options)


def start_tinyoai(path: Path, *flags: str, n_batch: int = N_SMALL_BATCH) -> Any:
    """tinyoai's server with one stream."""
    one_stream = ("--parallel", "1", "--threads", "1", "--batch-size", str(n_batch))
    return serve("--model", str(path), "--engine", "llamacpp", *one_stream, *flags)


GENERATORS = [SMOLLM2, *architectures.DECODERS]


class Engines(NamedTuple):
    """A model in this process and in the reference's server."""

    reference: LlamaServer
    engine: LlamaCppEngine


@pytest.fixture(scope="module", params=GENERATORS)
def engines(request: pytest.FixtureRequest) -> Iterator[Engines]:
    """Each model that generates."""
    path = model(request.param)
    with start_reference(path) as reference:
        options = {"n_ctx": N_CTX, "n_slots": 1, "n_batch": N_BATCH, "n_threads": 1}
        engine = open_engine(wire.Load(path=str(path), name="m", engine="llamacpp", **options))
        yield Engines(reference, engine)
        engine.close()


class Servers(NamedTuple):
    """A model in both servers."""

    reference: LlamaServer
    tinyoai: Server


@pytest.fixture(scope="module", params=GENERATORS)
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    """Each model that generates."""
    path = model(request.param)
    with (
        start_reference(path, n_batch=N_SMALL_BATCH) as reference,
        start_tinyoai(path, "--ctx-size", str(N_CTX)) as tinyoai,
    ):
        yield Servers(reference, tinyoai)


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
def test_the_engine_writes_the_same_tokens(engines: Engines, kind: str) -> None:
    reference, engine = engines
    ids = reference.post("/tokenize", content=PROMPTS[kind], add_special=True)["tokens"]
    assert kind != "long" or len(ids) > 4 * N_BATCH
    expected = reference.complete(ids, N_TOKENS)
    steps = greedy(engine, ids, N_TOKENS)
    assert [step.token for step in steps] == expected["tokens"]
    # an answer of a few tokens would compare little
    assert len(steps) > N_TOKENS // 3
    # the reference leaves out tokens that end within a character
    rows = expected["completion_probabilities"]
    assert len(rows) > len(steps) // 2
    left = iter(steps)
    for row in rows:
        near = pytest.approx(
            sorted((each["logprob"] for each in row["top_logprobs"]), reverse=True), abs=1e-3
        )
        assert any(step.token == row["id"] and step.likeliest == near for step in left), row


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_server_writes_the_same_text(servers: Servers, kind: str) -> None:
    expected = servers.reference.complete(PROMPTS[kind], N_TOKENS)
    reply = servers.tinyoai.post(
        "/v1/completions", prompt=PROMPTS[kind], temperature=0, max_tokens=N_TOKENS, logprobs=5
    ).json
    (choice,) = reply["choices"]
    assert reply["usage"]["prompt_tokens"] == expected["tokens_evaluated"]
    assert reply["usage"]["completion_tokens"] == expected["tokens_predicted"]
    assert choice["text"] == expected["content"]
    left = iter(choice["logprobs"]["token_logprobs"])
    for row in expected["completion_probabilities"]:
        near = pytest.approx(row["logprob"], abs=1e-3)
        assert any(given == near for given in left), row


CONVERSATIONS = {
    "question": [{"role": "user", "content": "What is the capital of France?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi\n"}],
    "turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "Write a poem."},
    ],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("servers", [SMOLLM2], indirect=True)
def test_the_chat_prompt_is_the_same(servers: Servers, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    prompt = servers.reference.post("/apply-template", messages=messages)["prompt"]
    ids = servers.reference.post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
    mine = servers.tinyoai.post("/apply-template", messages=messages).json
    assert mine["prompt"] == prompt
    assert mine["count"] == len(ids)
    asked = {"messages": messages, "temperature": 0, "max_tokens": 24}
    answers = [
        servers.reference.post("/v1/chat/completions", **asked),
        servers.tinyoai.post("/v1/chat/completions", **asked).json,
    ]
    reference, given = (answer["choices"][0]["message"]["content"] for answer in answers)
    assert given == reference


TEXTS = [
    "Hello world",
    "The quick brown fox jumps over the lazy dog, and it writes a letter to 42 friends.",
    "Z\u00fcrich \u4f60\u597d na\u00efve \u00bfqu\u00e9?",
]
LONG_TEXT = "one text that is longer than a step of a prompt, " * 20
EMBEDDINGS = [
    ("bert", ""),
    ("bert-mean", ""),
    ("bert", "mean"),
    ("bert", "last"),
    ("llama-embed", ""),
    ("qwen2-embed", ""),
    ("llama", "mean"),
    ("qwen3", "last"),
    ("gemma3", "mean"),
    (SMOLLM2, "mean"),
    (SMOLLM2, "last"),
]


@pytest.mark.parametrize(("name", "pooling"), EMBEDDINGS)
def test_embeddings_point_the_same_way(name: str, pooling: str) -> None:
    path = model(name)
    # low bits depend on the cut of a text into steps, and a last state shows it most
    texts = TEXTS if pooling == "last" else [*TEXTS, LONG_TEXT]
    # an embedding needs all tokens of its text in one step of the reference
    one_step = start_reference(path, n_batch=512, embeddings=True, pooling=pooling or None)
    with one_step as reference, start_tinyoai(path, *(["--pooling", pooling] if pooling else [])) as tinyoai:
        for text in [*texts, TEXTS[1], TEXTS[1]]:
            expected = np.array(reference.embed(text))
            given = np.array(tinyoai.post("/v1/embeddings", input=text).json["data"][0]["embedding"])
            assert np.linalg.norm(given) == pytest.approx(1, abs=1e-5)
            assert given @ expected / np.linalg.norm(expected) > 1 - 1e-4, text


def test_an_encoder_asked_for_text_names_the_endpoint_of_embeddings() -> None:
    with serve("--model", str(model("bert")), "--engine", "llamacpp") as tinyoai:
        for asked in ({"prompt": "Hello"}, {"messages": [{"role": "user", "content": "Hello"}]}):
            path = "/v1/completions" if "prompt" in asked else "/v1/chat/completions"
            response = tinyoai.post(path, **asked)
            assert response.status == 400
            assert "/v1/embeddings" in response.json["error"]["message"]
