"""Checks every kind of response against the shapes that OpenAI's clients expect.

The shapes are JSON Schemas. Extra fields of this server (timings, cached tokens) are allowed; a missing field
or a field of another type is an error.
"""

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tests.serving import Server

Shape = dict[str, Any]

STRING, INTEGER, NUMBER, NULL = ({"type": name} for name in ("string", "integer", "number", "null"))


def maybe(shape: Shape) -> Shape:
    """Returns a shape that also accepts null."""
    return {"anyOf": [shape, NULL]}


def some(shape: Shape) -> Shape:
    """Returns the shape of a list."""
    return {"type": "array", "items": shape}


def thing(needed: dict[str, Shape], more: dict[str, Shape] | None = None) -> Shape:
    """Returns the shape of an object with required and optional fields."""
    return {"type": "object", "required": list(needed), "properties": {**needed, **(more or {})}}


def const(value: str) -> Shape:
    """Returns the shape of one fixed string."""
    return {"const": value}


BYTES = maybe(some({"type": "integer", "minimum": 0, "maximum": 255}))
TOP_LOGPROB = thing({"token": STRING, "logprob": NUMBER, "bytes": BYTES})
TOKEN_LOGPROB = thing({"token": STRING, "logprob": NUMBER, "bytes": BYTES, "top_logprobs": some(TOP_LOGPROB)})
CHAT_LOGPROBS = maybe(thing({"content": maybe(some(TOKEN_LOGPROB)), "refusal": maybe(some(TOKEN_LOGPROB))}))
LEGACY_LOGPROBS = maybe(
    thing(
        {
            "tokens": some(STRING),
            "token_logprobs": some(maybe(NUMBER)),
            "top_logprobs": maybe(some(maybe({"type": "object", "additionalProperties": NUMBER}))),
            "text_offset": some(INTEGER),
        }
    )
)
REASON = {"enum": ["stop", "length", "tool_calls", "content_filter", "function_call"]}
USAGE = thing(
    {"prompt_tokens": INTEGER, "completion_tokens": INTEGER, "total_tokens": INTEGER},
    {"prompt_tokens_details": thing({}, {"cached_tokens": INTEGER, "audio_tokens": INTEGER})},
)
ROLE = {"enum": ["developer", "system", "user", "assistant", "tool"]}

CHAT = thing(
    {
        "id": {"type": "string", "pattern": "^chatcmpl-"},
        "object": const("chat.completion"),
        "created": INTEGER,
        "model": STRING,
        "choices": {
            **some(
                thing(
                    {
                        "index": INTEGER,
                        "finish_reason": REASON,
                        "logprobs": CHAT_LOGPROBS,
                        "message": thing(
                            {"role": const("assistant"), "content": maybe(STRING), "refusal": maybe(STRING)}
                        ),
                    }
                )
            ),
            "minItems": 1,
        },
        "usage": USAGE,
    },
    {"system_fingerprint": STRING},
)
CHUNK = thing(
    {
        "id": {"type": "string", "pattern": "^chatcmpl-"},
        "object": const("chat.completion.chunk"),
        "created": INTEGER,
        "model": STRING,
        "choices": some(
            thing(
                {
                    "index": INTEGER,
                    "delta": thing({}, {"role": ROLE, "content": maybe(STRING), "refusal": maybe(STRING)}),
                    "finish_reason": maybe(REASON),
                },
                {"logprobs": CHAT_LOGPROBS},
            )
        ),
    },
    {"usage": maybe(USAGE), "system_fingerprint": STRING},
)
COMPLETION = thing(
    {
        "id": {"type": "string", "pattern": "^cmpl-"},
        "object": const("text_completion"),
        "created": INTEGER,
        "model": STRING,
        "choices": some(
            thing(
                {
                    "index": INTEGER,
                    "text": STRING,
                    "logprobs": LEGACY_LOGPROBS,
                    "finish_reason": maybe(REASON),
                }
            )
        ),
    },
    {"usage": maybe(USAGE), "system_fingerprint": STRING},
)
WHOLE_COMPLETION = {
    "allOf": [
        COMPLETION,
        thing({"usage": USAGE, "choices": {**some(thing({"finish_reason": REASON})), "minItems": 1}}),
    ]
}
MODEL = thing({"id": STRING, "object": const("model"), "created": INTEGER, "owned_by": STRING})
MODELS = thing({"object": const("list"), "data": some(MODEL)})
EMBEDDINGS = thing(
    {
        "object": const("list"),
        "model": STRING,
        "data": some(
            thing(
                {
                    "object": const("embedding"),
                    "index": INTEGER,
                    "embedding": {"anyOf": [some(NUMBER), {"type": "string", "contentEncoding": "base64"}]},
                }
            )
        ),
        "usage": thing({"prompt_tokens": INTEGER, "total_tokens": INTEGER}),
    }
)
ERROR = thing(
    {"error": thing({"message": STRING, "type": STRING, "param": maybe(STRING), "code": maybe(STRING)})}
)


def hold(shape: Shape, answer: Any) -> None:
    """Raises a ValidationError if the answer does not have this shape."""
    jsonschema.Draft202012Validator(shape).validate(answer)


@pytest.fixture(params=["fake", "builtin"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Runs a test on the scripted engine and on the built-in model."""
    yield request.getfixturevalue(request.param)


CHATS: list[Shape] = [
    {},
    {"n": 3, "max_tokens": 5},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 3, "max_tokens": 4},
    {"max_tokens": 1},
    {"stop": ["e"]},
]
COMPLETIONS: list[Shape] = [
    {},
    {"logprobs": 0},
    {"logprobs": 3, "echo": True},
    {"echo": True, "max_tokens": 0},
    {"echo": True, "max_tokens": 0, "logprobs": 1},
    {"n": 2, "best_of": 3},
    {"prompt": ["one", "two"], "max_tokens": 3},
    {"prompt": [[66, 67], [68]], "max_tokens": 3},
]


@pytest.mark.parametrize("fields", CHATS, ids=str)
def test_chat(server: Server, fields: Shape) -> None:
    hold(CHAT, server.chat("Hello there!", seed=1, **fields).json)


@pytest.mark.parametrize("usage", [{}, {"stream_options": {"include_usage": True}}], ids=["plain", "usage"])
@pytest.mark.parametrize("fields", CHATS, ids=str)
def test_chat_chunks(server: Server, fields: Shape, usage: Shape) -> None:
    events = server.chat("Hello there!", seed=1, stream=True, **fields, **usage).events
    assert events.pop() == "[DONE]"
    for event in events:
        hold(CHUNK, event)
    if usage:
        hold(USAGE, events[-1]["usage"])


@pytest.mark.parametrize("fields", COMPLETIONS, ids=str)
def test_completion(server: Server, fields: Shape) -> None:
    reply = server.post("/v1/completions", **{"prompt": "Hello there", "seed": 1, "max_tokens": 6, **fields})
    hold(WHOLE_COMPLETION, reply.json)


@pytest.mark.parametrize("fields", [fields for fields in COMPLETIONS if "best_of" not in fields], ids=str)
def test_completion_events(server: Server, fields: Shape) -> None:
    asked = {"prompt": "Hello there", "seed": 1, "max_tokens": 6, "stream": True, **fields}
    events = server.post("/v1/completions", **asked).events
    assert events.pop() == "[DONE]"
    for event in events:
        hold(COMPLETION, event)


def test_models(server: Server) -> None:
    hold(MODELS, server.get("/v1/models").json)
    hold(MODEL, server.get(f"/v1/models/{server.model}").json)


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize(
    "given", ["one text", ["a text", "and another"], [66, 67], [[66], [67, 68]]], ids=str
)
def test_embeddings(server: Server, given: Any, encoding: str) -> None:
    answer = server.post("/v1/embeddings", input=given, encoding_format=encoding).json
    hold(EMBEDDINGS, answer)
    kind = str if encoding == "base64" else list
    assert all(isinstance(item["embedding"], kind) for item in answer["data"])


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"", 400),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b'{"model": "fake"}', 400),
        (
            "POST",
            "/v1/chat/completions",
            b'{"model": "x", "messages": [{"role": "user", "content": "a"}]}',
            404,
        ),
        ("POST", "/v1/completions", b'{"model": "x", "prompt": "a"}', 404),
        ("POST", "/v1/completions", b'{"model": "x", "prompt": {}}', 400),
        ("GET", "/v1/models/nobody", None, 404),
        ("GET", "/v1/nowhere", None, 404),
        ("PUT", "/v1/chat/completions", b"{}", 405),
        ("GET", "/docs/nothing", None, 404),
        ("POST", "/v1/embeddings", b'{"model": "fake", "input": ""}', 400),
        ("POST", "/v1/models/load", b'{"name": "nobody"}', 404),
    ],
)
def test_errors(fake: Server, method: str, path: str, body: bytes | None, status: int) -> None:
    reply = fake.request(method, path, body)
    assert reply.status == status
    hold(ERROR, reply.json)


def test_the_shapes_themselves_refuse() -> None:
    good: Shape = {"id": "a", "object": "model", "created": 1, "owned_by": "b"}
    hold(MODEL, good)
    for field in good:
        with pytest.raises(jsonschema.ValidationError):
            hold(MODEL, {key: value for key, value in good.items() if key != field})
        with pytest.raises(jsonschema.ValidationError):
            hold(MODEL, {**good, field: None})
