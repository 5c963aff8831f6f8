"""Every field wrong in type or range: a BadRequest that names it."""

import json
from typing import Any

import pytest

from tinyoai import errors
from tinyoai.api import schema

USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> schema.ChatRequest:
    """A chat request from JSON, as a client sends it."""
    return schema.chat_request(json.dumps({"model": "m", "messages": USER, **fields}).encode())


def completion(**fields: Any) -> schema.CompletionRequest:
    """A completion request from JSON."""
    return schema.completion_request(json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


WRONG_IN_BOTH: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": -1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": True}, "n"),
    ({"seed": 2**70}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**40}, "max_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repeat_penalty": 0}, "repeat_penalty"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop[1]"),
    ({"stop": ""}, "stop"),
    ({"stop": ["ok", ""]}, "stop"),
    ({"stop": ["x"] * 61}, "stop"),
    ({"stop": "x" * 1025}, "stop"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"one": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"model": ""}, "model"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"user": 5}, "user"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"ignore_eos": 1}, "ignore_eos"),
]


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
def test_a_limit_is_told_in_plain_words(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.BadRequest) as caught:
        chat(**fields)
    assert caught.value.message == message


def test_a_word_that_is_none_of_a_few_has_them_named() -> None:
    with pytest.raises(
        errors.BadRequest, match="'wizard'; it is one of system, developer, user, assistant, tool"
    ):
        chat(messages=[{"role": "wizard", "content": "hi"}])
    with pytest.raises(errors.BadRequest, match="'hex'; it is one of float, base64"):
        schema.embedding_request(b'{"model": "m", "input": "hi", "encoding_format": "hex"}')


@pytest.mark.parametrize("endpoint", [chat, completion])
@pytest.mark.parametrize(("fields", "param"), WRONG_IN_BOTH)
def test_a_wrong_field_is_named_the_same_on_both_endpoints(
    endpoint: Any, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(errors.BadRequest) as caught:
        request = endpoint(**fields)
        schema.logit_bias(request)
    assert (caught.value.param or "").startswith(param.split("[")[0])
    assert param.split(".")[-1].split("[")[0] in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"role": "boss", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [*USER, {"role": "user", "content": "a\0b"}]}, "messages[1].content"),
        ({"messages": USER * 2049}, "messages"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_wrong_in_chat(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(errors.BadRequest) as caught:
        chat(**fields)
    assert caught.value.param is not None
    assert caught.value.param.replace("[]", "[0]").startswith(param.split("[")[0])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": "a\0"}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
    ],
)
def test_wrong_in_completions(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(errors.BadRequest) as caught:
        schema.prompts(completion(**fields))
    assert (caught.value.param or "").startswith(param)


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
def test_what_is_no_request_at_all(body: bytes) -> None:
    for read in (schema.chat_request, schema.completion_request):
        with pytest.raises(errors.BadRequest) as caught:
            read(body)
        assert "Traceback" not in caught.value.message


def test_null_means_absent_and_unknown_fields_are_ignored() -> None:
    request = chat(
        temperature=None, stop=None, n=None, no_such_field={"a": [1]}, store=True, metadata={"a": "b"}
    )
    assert request.temperature is None
    assert schema.stops(request) == []


def test_contents_in_every_form() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    calls = [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    request = chat(
        messages=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "t", "tool_call_id": "call_1"},
        ]
    )
    assert [schema.content(m, i) for i, m in enumerate(request.messages)] == ["d", "ab", "", "t"]


def test_an_image_is_refused_at_its_place() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    request = chat(messages=[{"role": "user", "content": parts}])
    with pytest.raises(errors.BadRequest) as caught:
        schema.content(request.messages[0], 0)
    assert caught.value.param == "messages[0].content[1]"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_in_every_form(prompt: Any, expected: Any) -> None:
    assert schema.prompts(completion(prompt=prompt)) == expected
