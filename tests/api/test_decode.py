"""Request bodies: every invalid body raises a BadRequest that names the field in plain words."""

from typing import Any

import msgspec
import pytest

from tests.api.openai.requests import USER, chat
from tinyoai import errors
from tinyoai.api import decode
from tinyoai.api.openai.chat_types import ChatRequest
from tinyoai.api.openai.completions import CompletionRequest
from tinyoai.api.openai.embeddings import EmbeddingRequest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: must not be empty"),
        ({"model": ""}, "model: must not be empty"),
        ({"model": "m" * 513}, "model: must be at most 512 characters long"),
        ({"messages": USER * 2049}, "messages: must be at most 2048 items long"),
        ({"temperature": 3}, "temperature: must be at most 2.0"),
        ({"repeat_penalty": 0}, "repeat_penalty: must be more than 0.0"),
        ({"n": 0}, "n: must be at least 1"),
    ],
)
def test_a_bound_is_explained(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.BadRequest) as caught:
        chat(**fields)
    assert caught.value.message == message


def test_an_unknown_value_of_an_enumeration_lists_the_known_ones() -> None:
    with pytest.raises(
        errors.BadRequest, match="'wizard'; use one of assistant, developer, system, tool, user"
    ) as caught:
        chat(messages=[*USER, {"role": "wizard", "content": "hi"}])
    assert caught.value.param == "messages[1].role"
    with pytest.raises(errors.BadRequest, match="'hex'; use one of base64, float"):
        decode.decode(EmbeddingRequest, b'{"model": "m", "input": "hi", "encoding_format": "hex"}')


@pytest.mark.parametrize(
    ("message", "expected", "param"),
    [
        ("Something new - at `$.n`", "n: something new", "n"),
        ("Something new", "the body must be a JSON object: something new", None),
        ("Something - at - `$.n`", "the body must be a JSON object: something - at - `$.n`", None),
        ("Expected `int` near 5 - at `$.n`", "n: expected `int` near 5", "n"),
    ],
)
def test_unknown_msgspec_messages_pass_through(message: str, expected: str, param: str | None) -> None:
    error = decode._explain(message, ChatRequest)
    assert (error.message, error.param) == (expected, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"null",
        b"[]",
        b"5",
        b"\xff\xfe{}",
        b'{"model": "m", "messages": [], "x": "\xff"}',
        b'{"unknown": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "\\ud800"}',
        b'{"temperature": NaN}',
        b'{"temperature": 1e400}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        "\ufeff{}".encode(),
    ],
)
def test_bodies_that_are_not_a_request(body: bytes) -> None:
    for kind in (ChatRequest, CompletionRequest):
        with pytest.raises(errors.BadRequest) as caught:
            decode.decode(kind, body)
        assert "Traceback" not in caught.value.message


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(None, None), (0, 0), (5.5, 5.5), (-3, -1.0), ("10m", 600.0), ("-1", -1.0), (1e300, 1e9)],
)
def test_keep_alive(given: Any, seconds: float | None) -> None:
    assert decode.keep_alive(given) == seconds


def test_fields_of_any_request_are_bounded_by_their_types() -> None:
    class Request(msgspec.Struct):
        model: decode.Model

    assert decode.decode(Request, b'{"model": "m"}').model == "m"
    with pytest.raises(errors.BadRequest, match="the field 'model' is required"):
        decode.decode(Request, b"{}")
