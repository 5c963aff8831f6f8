"""Example requests of the OpenAPI document, by the id of the route and by title.

`bodies` adds the served model where the request has a field `model`.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from tinyoai.api.routes import Route

Json = dict[str, Any]

_HELLO = [{"role": "user", "content": "What is the capital of France?"}]

EXAMPLES: Mapping[str, Mapping[str, Json]] = {
    "createChatCompletion": {
        "A question": {"messages": _HELLO, "temperature": 0},
        "Streaming": {
            "messages": _HELLO,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        "A conversation": {
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "My name is Alice."},
                {"role": "assistant", "content": "Hello Alice! How can I help you today?"},
                {"role": "user", "content": "What's my name?"},
            ],
            "max_tokens": 40,
            "seed": 1,
        },
        "Two answers with log-probabilities": {
            "messages": [{"role": "user", "content": "Tell me a short story."}],
            "n": 2,
            "max_tokens": 30,
            "logprobs": True,
            "top_logprobs": 2,
        },
    },
    "createCompletion": {
        "A text": {"prompt": "Once upon a time", "max_tokens": 30, "temperature": 0},
        "Streaming": {"prompt": "Once upon a time", "max_tokens": 30, "temperature": 0, "stream": True},
        "Two texts with log-probabilities": {
            "prompt": ["The cat", "The dog"],
            "max_tokens": 8,
            "logprobs": 2,
            "echo": True,
        },
    },
    "createEmbedding": {
        "A text": {"input": "The cat sat on the mat."},
        "Several texts, in base64": {
            "input": ["The cat sat on the mat.", "What is 12 minus 7?"],
            "encoding_format": "base64",
            "dimensions": 64,
        },
    },
    "rerank": {
        "Three documents": {
            "query": "What is the capital of France?",
            "documents": ["Paris is the capital of France.", "Apples are red.", "France is in Europe."],
        },
        "The best of two, with its text": {
            "query": "red fruit",
            "documents": [{"text": "The sky is blue."}, {"text": "Apples are a red fruit."}],
            "top_n": 1,
            "return_documents": True,
        },
        "As TEI has it": {"query": "red fruit", "texts": ["The sky is blue.", "Apples are a red fruit."]},
    },
    "tokenize": {
        "Ids": {"content": "Hello, world!"},
        "Ids and texts": {"content": "Hello, world!", "add_special": True, "with_pieces": True},
    },
    "detokenize": {"Three tokens": {"tokens": [300, 301, 302]}},
    "applyTemplate": {"A question": {"messages": _HELLO}},
    "loadModel": {"A model": {}, "For ten minutes": {"keep_alive": "10m"}},
    "unloadModel": {"A model": {}},
    "startFinetune": {
        "Two examples": {
            "dataset": [
                {"prompt": "Where is the key?", "completion": "Under the mat."},
                {
                    "messages": [
                        {"role": "user", "content": "Where is the cat?"},
                        {"role": "assistant", "content": "On the roof."},
                    ]
                },
            ],
            "epochs": 1,
        },
    },
}


def bodies(route: Route, model: str) -> dict[str, Json]:
    """Returns a route's examples by title, for this model."""
    named = any(field.name == "model" for field in msgspec.structs.fields(route.request))
    return {
        title: {"model": model, **body} if named else dict(body)
        for title, body in EXAMPLES.get(route.id, {}).items()
    }
