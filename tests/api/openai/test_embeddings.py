"""POST /v1/embeddings over real sockets: every form of input, exact vectors, every error."""

import base64
import json
import math
import struct
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.engines import make
from tests.serving import Reply, Server, serve

N_FAKE = 256

NEARLY_EQUAL = (
    ("What is the capital of France?", "What is the capital of France", "We swim in the lake."),
    ("What is the capital of Japan?", "what is the capital of Japan?", "Blue and green."),
    ("The cat sat on the mat.", "The cat sat on a mat.", "What is 12 minus 7?"),
    ("Tell me a short story.", "Tell me a short story, please.", "The train leaves at nine."),
    ("I like red apples.", "I like green apples.", "How much is two and two?"),
    ("My name is Alice.", "My name is Bob.", "It will rain tomorrow."),
)
"""Triples: two similar sentences and an unrelated one."""


def histogram(text: str | bytes, n: int = N_FAKE) -> list[float]:
    """Returns the scripted engine's embedding of a text: its byte counts, scaled to length 1."""
    counts = Counter(text if isinstance(text, bytes) else text.encode())
    length = math.hypot(*(counts[byte] for byte in range(n))) or 1.0
    return [counts[byte] / length for byte in range(n)]


def embed(server: Server, given: Any, **fields: Any) -> Reply:
    """Sends one embeddings request."""
    return server.post("/v1/embeddings", input=given, **fields)


def vectors(reply: Reply) -> list[list[float]]:
    """Checks the shape of the response and returns its vectors in order."""
    assert reply.status == 200, reply.body
    answer = reply.json
    assert set(answer) == {"object", "data", "model", "usage"}
    assert answer["object"] == "list"
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    assert all(
        set(entry) == {"object", "index", "embedding"} and entry["object"] == "embedding"
        for entry in answer["data"]
    )
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"]
    return [entry["embedding"] for entry in answer["data"]]


def cosine(a: list[float], b: list[float]) -> float:
    """Returns the cosine of two vectors of length 1."""
    return sum(x * y for x, y in zip(a, b, strict=True))


# -- every form of input (rule 15) ---------------------------------------------------------------------


@pytest.mark.rule(15)
@pytest.mark.parametrize(
    ("given", "texts", "n_tokens"),
    [
        ("abba", ["abba"], 5),
        (["abba"], ["abba"], 5),
        (["abba", "h\u00e9", " "], ["abba", "h\u00e9", " "], 5 + 4 + 2),
        ([97, 98, 98, 97], ["abba"], 4),
        ([[97, 98], [99]], ["ab", "c"], 3),
        ([[256, 97]], ["a"], 2),
    ],
)
def test_every_form_of_input(fake: Server, given: Any, texts: list[str], n_tokens: int) -> None:
    reply = embed(fake, given)
    found = vectors(reply)
    assert len(found) == len(texts)
    for vector, text in zip(found, texts, strict=True):
        assert vector == pytest.approx(histogram(text), abs=1e-6)
    assert reply.json["usage"]["prompt_tokens"] == n_tokens
    assert reply.json["model"] == "fake"


@pytest.mark.rule(15)
def test_base64_is_little_endian_float32(fake: Server) -> None:
    as_floats = vectors(embed(fake, ["abba", "xyz"], encoding_format="float"))
    as_text = vectors(embed(fake, ["abba", "xyz"], encoding_format="base64"))
    for text, floats in zip(as_text, as_floats, strict=True):
        assert isinstance(text, str)
        assert list(struct.unpack(f"<{N_FAKE}f", base64.b64decode(text, validate=True))) == floats


@pytest.mark.rule(15)
@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_dimensions_truncates_and_rescales_to_length_one(fake: Server, encoding_format: str) -> None:
    (found,) = vectors(embed(fake, "abbac", dimensions=99, encoding_format=encoding_format))
    if isinstance(found, str):
        found = list(struct.unpack("<99f", base64.b64decode(found)))
    assert found == pytest.approx(histogram("abba", 99), abs=1e-6)


def test_null_means_absent(fake: Server) -> None:
    (found,) = vectors(embed(fake, "a", dimensions=None, encoding_format=None, user=None))
    assert found == pytest.approx(histogram("a"))


def test_two_thousand_inputs_are_answered_in_order(fake: Server) -> None:
    texts = [f"text {number} " + "x" * (number % 50) for number in range(2048)]
    found = vectors(embed(fake, texts))
    for vector, text in zip(found, texts, strict=True):
        assert vector == pytest.approx(histogram(text), abs=1e-6)


def test_the_route_works_without_v1(fake: Server) -> None:
    assert vectors(fake.post("/embeddings", input="a")) == vectors(embed(fake, "a"))


# -- errors ----------------------------------------------------------------------------------------------


@pytest.mark.rule(15)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[]]}, "input[0]"),
        ({"input": ["a", 5]}, "input"),
        ({"input": ["a", [5]]}, "input"),
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": [True]}, "input[0]"),
        ({"input": [1.5]}, "input[0]"),
        ({"input": [-1]}, "input[0]"),
        ({"input": [97, 260]}, "input"),
        ({"input": [[97], [2**31 - 1]]}, "input[1]"),
        ({"input": ["a", "b\0c"]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": N_FAKE + 1}, "dimensions"),
        ({"input": "a", "dimensions": "8"}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "model": 5}, "model"),
        ({"input": "a", "keep_alive": "soon"}, "keep_alive"),
    ],
)
def test_errors_name_the_wrong_field(fake: Server, fields: dict[str, Any], param: str) -> None:
    reply = fake.post("/v1/embeddings", **fields)
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    assert reply.error["param"] == param


def test_the_error_names_the_input_that_is_too_long(fake: Server) -> None:
    reply = embed(fake, ["short", "y" * 5000, "short"])
    assert reply.status == 400
    assert reply.error["code"] == "context_length_exceeded"
    assert reply.error["param"] == "input[1]"
    assert "4096" in reply.error["message"]
    # the other inputs of the request are cancelled, and the next request is answered
    assert vectors(embed(fake, "a"))


def test_an_unknown_model_is_a_404(fake: Server) -> None:
    reply = embed(fake, "a", model="text-embedding-3-small")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")


def test_a_model_that_cannot_embed_says_which_can(tmp_path: Path) -> None:
    path = make.gpt2_ggml(tmp_path / "old.bin")
    with serve("--model", str(path), "--model-type", "gpt2") as server:
        reply = embed(server, "hello")
        assert (reply.status, reply.error["param"]) == (400, "model")
        assert "no hidden states of the architecture gpt2" in reply.error["message"]
        card = server.get(f"/v1/models/{server.model}").json
        assert (card["dimensions"], card["pooling"]) == (0, None)
        assert server.chat("hi", max_tokens=2).status == 200


# -- clients that disconnect, workers that die -----------------------------------------------------------


SLOW = '!{"step_ms": 50}\n' + "x" * 3000
"""A text that takes the scripted engine minutes."""


def slots(server: Server) -> dict[str, int]:
    """Returns the numbers of slots: total, busy and free."""
    return dict(server.get("/v1/models/status").json["data"][0]["slots"])


def test_a_client_that_disconnects_frees_every_slot() -> None:
    with serve("--engine", "fake", "--parallel", "2") as server:
        body = json.dumps({"model": "fake", "input": [SLOW] * 50}).encode()
        with server.connect() as connection:
            head = f"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            while slots(server)["busy"] < 2:
                pass  # the request is still on its way
        # the request held both slots for minutes: without a cancel, these would not be answered in time
        for number in range(4):
            assert server.say(f"after {number}") == f"after {number}"


def test_a_worker_that_dies_fails_only_the_running_request() -> None:
    with serve("--engine", "fake", "--log-level", "error") as server:
        reply = embed(server, ["a", '!{"kill_at": 0}\n', "b"])
        assert (reply.status, reply.error["code"]) == (500, "worker_died")
        (found,) = vectors(embed(server, "a"))
        assert found == pytest.approx(histogram("a"))


def test_a_failing_engine_is_a_model_error(fake: Server) -> None:
    reply = embed(fake, '!{"fail_at": 2}\nabcdef')
    assert (reply.status, reply.error["code"]) == (500, "model_error")


# -- the built-in model ------------------------------------------------------------------------------------


def test_similar_sentences_are_nearer_than_unrelated_ones(builtin: Server) -> None:
    found = vectors(embed(builtin, [text for triple in NEARLY_EQUAL for text in triple]))
    assert all(math.hypot(*vector) == pytest.approx(1.0, rel=1e-5) for vector in found)
    triples = [found[at : at + 3] for at in range(0, len(found), 3)]
    for (one, other, _), texts in zip(triples, NEARLY_EQUAL, strict=True):
        near = cosine(one, other)
        far = max(cosine(one, unrelated) for triple in triples for unrelated in triple[2:])
        assert near > far, texts


def test_equal_texts_have_equal_vectors_regardless_of_earlier_requests(builtin: Server) -> None:
    text = "What is the capital of France? " * 5
    (alone,) = vectors(embed(builtin, text))
    builtin.chat(text, max_tokens=3)
    builtin.post("/v1/completions", prompt=text, max_tokens=3)
    found = vectors(embed(builtin, [text, text + "x", text, "y", text]))
    assert found[0] == found[2] == found[4] == alone
    assert found[1] != alone


def test_ids_and_their_text_have_the_same_vector(builtin: Server) -> None:
    text = "The cat sat on the mat."
    ids = builtin.post("/tokenize", content=text, add_special=True).json["tokens"]
    assert vectors(embed(builtin, ids)) == vectors(embed(builtin, text))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_other_pooling_methods(pooling: str) -> None:
    with serve("--pooling", pooling) as server:
        texts = ["What is the capital of France?", "What is the capital of France", "I like to eat apples."]
        one, other, unrelated = vectors(embed(server, texts))
        assert cosine(one, other) > cosine(one, unrelated)
        assert server.get(f"/v1/models/{server.model}").json["pooling"] == pooling


def test_the_model_card_describes_the_embedding(builtin: Server) -> None:
    card = builtin.get("/v1/models/tinyoai-chat").json
    assert (card["dimensions"], card["pooling"]) == (256, "weighted-mean")


# -- real clients --------------------------------------------------------------------------------------------


def test_curl(builtin: Server) -> None:
    command = ["curl", "-sS", f"{builtin.url}/embeddings", "-H", "Content-Type: application/json"]
    body = '{"model": "tinyoai-chat", "input": ["Hello world", "Goodbye"], "dimensions": 4}'
    ran = subprocess.run([*command, "-d", body], capture_output=True, text=True, check=True, timeout=60)
    assert [len(entry["embedding"]) for entry in json.loads(ran.stdout)["data"]] == [4, 4]
