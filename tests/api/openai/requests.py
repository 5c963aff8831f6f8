"""Bodies of both completion endpoints as JSON, and fields that both endpoints reject."""

import json
from typing import Any

from tinyoai import wire
from tinyoai.api import decode
from tinyoai.api.openai import chat as chat_endpoint
from tinyoai.api.openai import completions as completions_endpoint
from tinyoai.api.openai.chat_types import ChatRequest
from tinyoai.api.openai.completions import CompletionRequest
from tinyoai.models.registry import Defaults

USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> wire.Generate:
    """Decodes a chat request and returns the worker's body. Raises errors.BadRequest."""
    request = decode.decode(ChatRequest, json.dumps({"model": "m", "messages": USER, **fields}).encode())
    chat_endpoint.check(request)
    decode.keep_alive(request.keep_alive)
    return chat_endpoint.generate(
        request, chat_endpoint.conversation(request.messages, request.chat_template_kwargs), Defaults()
    )


def completion(**fields: Any) -> list[str | list[int]]:
    """Decodes and checks a completion request and returns its prompts. Raises errors.BadRequest."""
    request = decode.decode(CompletionRequest, json.dumps({"model": "m", "prompt": "hi", **fields}).encode())
    completions_endpoint.check(request)
    decode.keep_alive(request.keep_alive)
    found = completions_endpoint.prompts(request)
    chat_endpoint.generate(request, [], Defaults())
    return found


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
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1.2, "repeat_penalty": 1.1}, "repetition_penalty"),
    ({"keep_alive": "soon"}, "keep_alive"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"model": ""}, "model"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"user": 5}, "user"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"ignore_eos": 1}, "ignore_eos"),
]
