"""Chat requests: errors name the wrong field, and a valid request becomes one body for the worker."""

from typing import Any

import pytest

from tests.api.openai.requests import USER, WRONG_IN_BOTH, chat, completion
from tinyoai import errors, wire
from tinyoai.api.openai.chat import generate
from tinyoai.api.openai.chat_types import Generation
from tinyoai.models.registry import Defaults


@pytest.mark.parametrize("endpoint", [chat, completion])
@pytest.mark.parametrize(("fields", "param"), WRONG_IN_BOTH)
def test_a_wrong_field_is_named_the_same_on_both_endpoints(
    endpoint: Any, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(errors.BadRequest) as caught:
        endpoint(**fields)
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
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
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
def test_wrong_fields_of_a_chat_request(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(errors.BadRequest) as caught:
        chat(**fields)
    assert caught.value.param is not None
    assert caught.value.param.replace("[]", "[0]").startswith(param.split("[")[0])


def test_null_means_absent_and_unknown_fields_are_ignored() -> None:
    body = chat(
        temperature=None, stop=None, n=None, no_such_field={"a": [1]}, store=True, metadata={"a": "b"}
    )
    assert body.sampling.temperature == 1.0
    assert body.stop == []
    assert body.n == 1


def texts(body: wire.Generate) -> list[str]:
    """Returns the contents of the messages."""
    assert isinstance(body.prompt, wire.Conversation)
    return [message.content for message in body.prompt.messages]


def test_every_form_of_content() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    calls = [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    body = chat(
        messages=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "t", "tool_call_id": "call_1"},
        ]
    )
    assert texts(body) == ["d", "ab", "", "t"]


def test_the_error_for_an_image_names_its_position() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    with pytest.raises(errors.BadRequest) as caught:
        chat(messages=[*USER, {"role": "user", "content": parts}])
    assert caught.value.param == "messages[1].content[1]"


def test_all_choices_travel_in_one_body() -> None:
    assert chat(n=16).n == 16


@pytest.mark.parametrize(
    ("fields", "penalty"),
    [
        ({}, 1.0),
        ({"repeat_penalty": 1.5}, 1.5),
        ({"repetition_penalty": 1.5}, 1.5),
        ({"repetition_penalty": 1.5, "repeat_penalty": 1.5}, 1.5),
        ({"repetition_penalty": None, "repeat_penalty": 1.2}, 1.2),
    ],
)
def test_repetition_penalty_is_an_alias_of_repeat_penalty(fields: dict[str, Any], penalty: float) -> None:
    assert chat(**fields).sampling.repeat_penalty == penalty


def test_request_fields_override_the_models_defaults() -> None:
    defaults = Defaults(temperature=0.5, top_p=0.5, repeat_penalty=1.3)
    request = Generation(model="m", temperature=0.9, repetition_penalty=1.1)
    sampling = generate(request, [], defaults).sampling
    assert (sampling.temperature, sampling.top_p, sampling.repeat_penalty) == (0.9, 0.5, 1.1)


def test_a_seed_or_temperature_0_makes_answers_repeatable() -> None:
    assert chat(seed=1).exact
    assert chat(temperature=0).exact
    assert not chat().exact
    assert generate(Generation(model="m"), [], Defaults(temperature=0)).exact
    assert chat(seed=-1).sampling.seed == 2**64 - 1
