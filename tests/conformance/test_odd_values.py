"""Every field of both endpoints with every odd value: 200, or a 400 that names a field, never a 5xx."""

import json
from typing import Any

import msgspec
import pytest

from tests.serving import Server
from tinyoai.api.openai.chat_types import ChatRequest
from tinyoai.api.openai.completions import CompletionRequest
from tinyoai.api.openai.embeddings import EmbeddingRequest
from tinyoai.api.rerank import RerankRequest
from tinyoai.api.tokenizer import DetokenizeRequest, TemplateRequest, TokenizeRequest

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 0.5, 1e308, -1e308, 2**31, 2**63, 2**70, -(2**63), "", "x", "\u0000", "\ud800",
    [], [0], [[]], [None], ["", "x"], {}, {"a": 1}, {"1": 5}, {"-1": 1}, [{"role": "user"}], [{"type": "text"}],
    [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "user", "content": None}], "\N{GRINNING FACE}" * 99,
]  # fmt: skip
ENDPOINTS = {
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "hi"}]}),
    "/v1/completions": (CompletionRequest, {"prompt": "hi\n"}),
    "/v1/embeddings": (EmbeddingRequest, {"input": "hi"}),
    "/v1/rerank": (RerankRequest, {"query": "hi", "documents": ["hi"]}),
    "/tokenize": (TokenizeRequest, {"content": "hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [97]}),
    "/apply-template": (TemplateRequest, {"messages": [{"role": "user", "content": "hi"}]}),
}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_any_value_in_any_field(fake: Server, path: str) -> None:
    kind, base = ENDPOINTS[path]
    n_answered = 0
    for field in [f.encode_name for f in msgspec.structs.fields(kind)] + ["unknown"]:
        for value in ODD:
            more = {"max_tokens": 3} if "completions" in path else {}
            body = json.dumps({"model": "fake", **more, **base, field: value}).encode()
            reply = fake.request("POST", path, body)
            assert reply.status in (200, 400, 404), (field, value, reply.body)
            if reply.status == 200:
                n_answered += 1
            elif field != "model" and value != "\ud800":
                error = reply.error
                assert error["type"] == "invalid_request_error"
                assert field.split("_")[0] in (error["param"] or "") + error["message"], (field, value, error)
    assert n_answered > 25
    assert fake.say("still well") == "still well"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "fake", "messages": [{"role": "user", "content": "a"}], "temperature": 0.1, "temperature": 0.2}',
        b'{"model": "fake", "messages": [{"role": "user", "content": "a"}]}   \n',
    ],
)
def test_odd_but_valid_json(fake: Server, body: bytes) -> None:
    reply = fake.request("POST", "/v1/chat/completions", body)
    assert reply.json["choices"][0]["message"]["content"] == "a"


def test_very_many_messages_and_characters(fake: Server) -> None:
    many = [{"role": "user", "content": "x"}] * 10_000
    reply = fake.post("/v1/chat/completions", messages=many)
    assert (reply.status, reply.error["param"]) == (400, "messages")
    reply = fake.chat("y" * 1_000_000)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
