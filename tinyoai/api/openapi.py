"""This server described in OpenAPI 3.1.

Owns the table of operations and the words about each; the shapes come from the very types that parse
requests and make answers, and the refusals from the exception tree. Imported at the first request for
it, since a server that nobody asks should not pay for it. It must not know how anything is answered.

A new endpoint is one line more in OPERATIONS, and one in FIELDS for every new field of its request.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from tinyoai import __version__, errors
from tinyoai.api import finetune_types, schema

Json = dict[str, Any]


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path, as clients see it."""

    method: str
    path: str
    tag: str
    id: str
    summary: str
    text: str = ""
    body: Any = None
    """The type that parses the request."""
    examples: Mapping[str, Json] = {}
    """Bodies by title; where the type has a `model`, the served one's name is put in front."""
    answer: Any = None
    """The type of a 200; None: not JSON."""
    content_type: str = "application/json"
    event: Any = None
    """The type of a stream's events, where the request may ask for one."""
    refusals: tuple[type[errors.ApiError], ...] = ()
    """Besides those of every operation."""
    unready: bool = False
    """A 503 has the same body as a 200."""
    public: bool = False
    """Needs no key where keys are asked for."""


_ANY = (errors.BadRequest, errors.Forbidden, errors.HeadersTooLarge, errors.InternalError, errors.Unavailable)
"""What can befall every request."""
_KEYED = (errors.Unauthorized, errors.RateLimited)
"""What can befall every request where keys or rate limits are on."""
_BODY = (
    errors.InvalidJson,
    errors.RequestTimeout,
    errors.PayloadTooLarge,
    errors.UnsupportedMediaType,
    errors.ExpectationFailed,
)
"""What can befall every request with a body."""
_MODEL = (errors.ModelNotFound, errors.ModelLoading, errors.ModelFailed, errors.InsufficientMemory)
"""What can befall every request that names a model."""
_RUN = (errors.ContextLengthExceeded, errors.Overloaded, errors.ModelError, errors.WorkerDied)
"""What can befall every request that a model evaluates."""

_HELLO = [{"role": "user", "content": "What is the capital of France?"}]

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        method="POST",
        path="/v1/chat/completions",
        tag="Answers",
        id="createChatCompletion",
        summary="Answer a conversation",
        text="The last message is answered in the light of those before it. With `stream` the answer comes "
        "piece by piece as server-sent events: each `data:` line is a `ChatChunk`, and `data: [DONE]` ends it.",
        body=schema.ChatRequest,
        examples={
            "A question": {"messages": _HELLO, "temperature": 0},
            "Piece by piece": {
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
        answer=schema.ChatCompletion,
        event=schema.ChatChunk,
        refusals=(*_BODY, *_MODEL, *_RUN),
    ),
    Operation(
        method="POST",
        path="/v1/completions",
        tag="Answers",
        id="createCompletion",
        summary="Continue a text",
        text="The legacy endpoint: no roles, no template. With `stream` each `data:` line is a `Completion` with a "
        "piece of the text, and `data: [DONE]` ends it.",
        body=schema.CompletionRequest,
        examples={
            "A text": {"prompt": "Once upon a time", "max_tokens": 30, "temperature": 0},
            "Piece by piece": {
                "prompt": "Once upon a time",
                "max_tokens": 30,
                "temperature": 0,
                "stream": True,
            },
            "Two texts, each with its log-probabilities": {
                "prompt": ["The cat", "The dog"],
                "max_tokens": 8,
                "logprobs": 2,
                "echo": True,
            },
        },
        answer=schema.Completion,
        event=schema.Completion,
        refusals=(*_BODY, *_MODEL, *_RUN),
    ),
    Operation(
        method="POST",
        path="/v1/embeddings",
        tag="Answers",
        id="createEmbedding",
        summary="Turn texts into vectors",
        text="One vector of length 1 for each input, in order: the more two texts say the same, the nearer their "
        "vectors. All inputs of a request are evaluated side by side, as many at a time as there are slots.",
        body=schema.EmbeddingRequest,
        examples={
            "A text": {"input": "The cat sat on the mat."},
            "Several, in base64": {
                "input": ["The cat sat on the mat.", "What is 12 minus 7?"],
                "encoding_format": "base64",
                "dimensions": 64,
            },
        },
        answer=schema.EmbeddingList,
        refusals=(*_BODY, *_MODEL, *_RUN),
    ),
    Operation(
        method="POST",
        path="/tokenize",
        tag="Answers",
        id="tokenize",
        summary="Turn a text into tokens",
        text="A text never becomes control tokens, whatever it says. `max_model_len` is the context window. No slot "
        "is needed, so this answers while all are busy.",
        body=schema.TokenizeRequest,
        examples={
            "Ids": {"content": "Hello, world!"},
            "With their texts": {"content": "Hello, world!", "add_special": True, "with_pieces": True},
        },
        answer=schema.Tokenized,
        refusals=(*_BODY, *_MODEL),
    ),
    Operation(
        method="POST",
        path="/detokenize",
        tag="Answers",
        id="detokenize",
        summary="Turn tokens into a text",
        body=schema.DetokenizeRequest,
        examples={"Three tokens": {"tokens": [300, 301, 302]}},
        answer=schema.Detokenized,
        refusals=(*_BODY, *_MODEL),
    ),
    Operation(
        method="GET",
        path="/tokenizer_info",
        tag="Answers",
        id="tokenizerInfo",
        summary="Describe the default model's vocabulary",
        text="What evaluation programs such as lm-evaluation-harness ask before they tokenize with this server.",
        answer=schema.TokenizerInfo,
        refusals=_RUN,
    ),
    Operation(
        method="POST",
        path="/apply-template",
        tag="Answers",
        id="applyTemplate",
        summary="See what a conversation becomes",
        text="The prompt that a chat request with these messages puts before the model, and its length in tokens.",
        body=schema.TemplateRequest,
        examples={"A question": {"messages": _HELLO}},
        answer=schema.AppliedTemplate,
        refusals=(*_BODY, *_MODEL),
    ),
    Operation(
        method="GET",
        path="/v1/models",
        tag="Models",
        id="listModels",
        summary="List the models",
        answer=schema.ModelList,
    ),
    Operation(
        method="GET",
        path="/v1/models/status",
        tag="Models",
        id="modelsStatus",
        summary="How every model is",
        text="Its state, uptime, worker process, memory, slots, queue and speed; those whose file is gone or cannot be "
        "served are listed with the reason.",
        answer=schema.ModelsStatus,
    ),
    Operation(
        method="POST",
        path="/v1/models/load",
        tag="Models",
        id="loadModel",
        summary="Load a model before it is asked",
        text="Answers when it is loaded. A model is also loaded by the first request that names it.",
        body=schema.LoadRequest,
        examples={"A model": {}, "For ten minutes": {"keep_alive": "10m"}},
        answer=schema.ModelAction,
        refusals=(*_BODY, *_MODEL),
    ),
    Operation(
        method="POST",
        path="/v1/models/unload",
        tag="Models",
        id="unloadModel",
        summary="Give a model's memory back",
        text="At once, or with its last running answer where it is in use; the next request loads it again.",
        body=schema.ModelRequest,
        examples={"A model": {}},
        answer=schema.ModelAction,
        refusals=(*_BODY, errors.ModelNotFound),
    ),
    Operation(
        method="DELETE",
        path="/v1/models/{id}",
        tag="Models",
        id="deleteModel",
        summary="Take a model off the registry",
        text="Its file stays. The model that the server was started with, and those in its models folder, cannot go.",
        answer=schema.ModelDeleted,
        refusals=(errors.ModelNotFound,),
    ),
    Operation(
        method="GET",
        path="/v1/models/{id}",
        tag="Models",
        id="retrieveModel",
        summary="Describe one model",
        text="The id may hold slashes.",
        answer=schema.Model,
        refusals=(errors.ModelNotFound,),
    ),
    Operation(
        method="POST",
        path="/api/finetune/start",
        tag="Fine-tuning",
        id="startFinetune",
        summary="Train a model further on examples",
        text="With LoRA, or with `use_lora: false` its matrices themselves. One job runs at a time, in a process of "
        "its own and behind all serving; the new model is registered when it is done. Needs the extra `finetune`.",
        body=finetune_types.FinetuneRequest,
        examples={
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
        answer=finetune_types.FinetuneStarted,
        refusals=(
            *_BODY,
            errors.NotFound,
            errors.ModelNotFound,
            errors.InsufficientMemory,
            errors.Overloaded,
        ),
    ),
    Operation(
        method="GET",
        path="/api/finetune/jobs",
        tag="Fine-tuning",
        id="listFinetunes",
        summary="List the fine-tuning jobs",
        answer=finetune_types.FinetuneJobs,
    ),
    Operation(
        method="GET",
        path="/api/finetune/status/{job_id}",
        tag="Fine-tuning",
        id="finetuneStatus",
        summary="How a fine-tuning job is",
        text="With its learning curve, of at most 1,000 points, and the last lines of its log.",
        answer=finetune_types.FinetuneStatus,
        refusals=(errors.NotFound,),
    ),
    Operation(
        method="POST",
        path="/api/finetune/stop/{job_id}",
        tag="Fine-tuning",
        id="stopFinetune",
        summary="End a fine-tuning job",
        text="One that has ended already stays as it is. Only the server that holds the queue of the data "
        "directory can stop a job.",
        answer=finetune_types.FinetuneStopped,
        refusals=(errors.BadRequest, errors.NotFound),
    ),
    Operation(
        method="GET",
        path="/health",
        tag="Operation",
        id="health",
        summary="Can requests be answered?",
        text="200 while they can, else 503 with the same body: `status` says why, `models` how each model is.",
        answer=schema.Health,
        unready=True,
        public=True,
    ),
    Operation(
        method="GET",
        path="/health/ready",
        tag="Operation",
        id="ready",
        summary="Can requests be answered?",
        text="The same as `/health`, for those who look for it under this name.",
        answer=schema.Health,
        unready=True,
        public=True,
    ),
    Operation(
        method="GET",
        path="/health/live",
        tag="Operation",
        id="live",
        summary="Does the server live?",
        text="200 as long as it answers at all.",
        answer=schema.Alive,
        public=True,
    ),
    Operation(
        method="GET",
        path="/metrics",
        tag="Operation",
        id="metrics",
        summary="What was measured, for Prometheus",
        text="With the extra `metrics`: times to the first token and per token, waits, tokens, cache reuse, "
        "requests by route and status, models' states and memory. Without it a 404 that says so.",
        content_type="text/plain",
        refusals=(errors.NotFound,),
    ),
    Operation(
        method="GET",
        path="/openapi.json",
        tag="Operation",
        id="openapi",
        summary="This description",
        answer=Json,
        public=True,
    ),
    Operation(
        method="GET",
        path="/docs",
        tag="Operation",
        id="docs",
        summary="This description, to read and to try out",
        content_type="text/html",
        public=True,
    ),
)
"""Everything that is served, in the order in which it is shown."""

FIELDS: Mapping[str, str] = {
    "model": "Which model: an id from `GET /v1/models`. An unknown one is a 404, never another model.",
    "messages": "The conversation so far, oldest first.",
    "prompt": "A text, several texts, token ids, or several lists of token ids.",
    "stream": "Send the answer piece by piece, as server-sent events.",
    "stream_options": "What a stream carries besides its text.",
    "include_usage": "One more chunk before the end has the token counts, and no choice.",
    "include_obfuscation": "Accepted and without effect.",
    "max_tokens": "At most so many tokens. Chat: until the model ends; completions: 16.",
    "max_completion_tokens": "The newer name of `max_tokens`; the smaller of the two holds.",
    "min_tokens": "The model may not end its answer before so many tokens.",
    "ignore_eos": "The model may not end its answer: it goes on to `max_tokens` or the context's end.",
    "temperature": "0: always the likeliest token, the same answer every time. 1: as the model was trained.",
    "top_p": "Only the likeliest tokens that together have this probability.",
    "top_k": "Only so many of the likeliest tokens; 0 or -1: all.",
    "min_p": "Only tokens at least this fraction as likely as the likeliest.",
    "n": "So many answers to the same prompt.",
    "best_of": "Make so many, and return the `n` likeliest; not with `stream`.",
    "seed": "Equal seeds give equal answers, whatever else runs beside.",
    "stop": "Texts that end the answer; none of them is part of it.",
    "presence_penalty": "Above 0: tokens that were there already become less likely.",
    "frequency_penalty": "Above 0: the more often a token was there, the less likely it becomes.",
    "repeat_penalty": "Above 1: divides the likelihood of the last 64 tokens.",
    "logit_bias": "Token id to a number that is added to its logit; -100 forbids it.",
    "logprobs": "Chat: true gives every token's log-probability. Completions: 0 to 5, and so many alternatives.",
    "top_logprobs": "So many alternatives for each token; needs `logprobs`.",
    "echo": "Begin the answer with the prompt, with its log-probabilities where they are asked for.",
    "suffix": "A text after the gap; refused, as no model here has infill tokens.",
    "user": "Accepted and without effect.",
    "tools": "Refused unless empty: this server does not call tools.",
    "tool_choice": "Accepted and without effect.",
    "functions": "Refused unless empty: this server does not call tools.",
    "response_format": "Only `text`.",
    "modalities": "Only `text`.",
    "role": "Who speaks; `developer` is `system`.",
    "content": "What is said: a text, or parts of type `text`.",
    "name": "Of a model: the same as `model`. Of a message: accepted and without effect.",
    "keep_alive": "How long the model stays loaded after this: seconds, or a time such as `10m`; 0 not at all, "
    "-1 for ever.",
    "model_id": "Which model, by its number in the registry: `model_id` in `GET /v1/models`.",
    "dataset": "The examples themselves, or a file of JSON lines in the data directory's folder `datasets`, by name.",
    "epochs": "How often every example is seen; 3 by default.",
    "batch_size": "Examples in a step; 4 by default.",
    "learning_rate": "Its peak; 0.0002 by default.",
    "use_lora": "false: train the matrices themselves, which takes more memory.",
    "lora_r": "The adapters' rank; 16 by default.",
    "lora_alpha": "Divided by the rank, how much the adapters count; 32 by default.",
    "max_length": "Tokens of an example; longer ones are cut at their end; 512 by default.",
    "input": "What to embed: a text, several texts, token ids, or several lists of token ids; none may be empty.",
    "encoding_format": "`float`: numbers; `base64`: little-endian float32.",
    "dimensions": "Keep so many numbers of each vector, at length 1 again.",
    "add_special": "Begin with the token that begins a prompt.",
    "with_pieces": "Give each token's text too, or its bytes where these are no text by themselves.",
    "add_special_tokens": "vLLM's name for `add_special`.",
    "tokens": "Token ids; one that is not in the vocabulary is refused.",
    "tool_calls": "Accepted and without effect.",
    "tool_call_id": "Accepted and without effect.",
    "type": "`text`; another kind is refused.",
    "text": "The text.",
}
"""What each field of a request means."""

_INFO = """\
A small local LLM server that speaks OpenAI's HTTP API.

* Every path answers with and without `/v1` before it.
* `null` in an optional field means that it is absent; unknown fields are ignored, known ones are checked.
* Every refusal has OpenAI's error body, and its `message` says what to do.
* Every answer has an `X-Request-ID`: the request's own if it is short and plain, else a new one.
* A key is needed only where the server was started with one: `Authorization: Bearer KEY` or `x-api-key: KEY`.
"""

_TAGS = {
    "Answers": "What a model says.",
    "Models": "What there is to ask.",
    "Fine-tuning": "Making a new model out of one that is there.",
    "Operation": "How the server is, and what it offers.",
}

_REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)\}")


def document(model: str) -> Json:
    """The whole document, its examples about `model`."""
    schemas = _schemas()
    paths: dict[str, Json] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, model)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tinyoai",
            "version": __version__,
            "description": _INFO,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


# -- schemas -----------------------------------------------------------------------------------------


def _types() -> list[Any]:
    found: list[Any] = [errors.ErrorBody]
    for operation in OPERATIONS:
        found += [kind for kind in (operation.body, operation.answer, operation.event) if kind is not None]
    return list(dict.fromkeys(kind for kind in found if kind is not Json))


def _schemas() -> Json:
    """Every type by its name, with FIELDS' words on what a client may send."""
    _, schemas = msgspec.json.schema_components(_types(), ref_template=_REF)
    for name in _sent(schemas):
        for field, shape in schemas[name].get("properties", {}).items():
            if field in FIELDS:
                shape["description"] = FIELDS[field]
    return dict(sorted(schemas.items()))


def _sent(schemas: Json) -> set[str]:
    """The names of the types that requests are made of."""
    waiting = [operation.body.__name__ for operation in OPERATIONS if operation.body is not None]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += re.findall(r"#/components/schemas/(\w+)", str(schemas[name]))
    return found


def _shape(kind: Any) -> Json:
    return {"type": "object"} if kind is Json else {"$ref": _REF.format(name=kind.__name__)}


# -- operations --------------------------------------------------------------------------------------


def _operation(operation: Operation, model: str) -> Json:
    made: Json = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": _responses(operation),
        "security": [] if operation.public else [{}, {"bearer": []}, {"x-api-key": []}],
    }
    if operation.text:
        made["description"] = operation.text
    parameters = _PARAMETER.findall(operation.path)
    if parameters:
        made["parameters"] = [
            {
                "name": name,
                "in": "path",
                "required": True,
                "schema": {"type": "string", "minLength": 1}
                if name == "id"
                else {"type": "integer", "minimum": 1},
                "example": model if name == "id" else 1,
            }
            for name in parameters
        ]
    if operation.body is not None:
        examples = {title: {"value": body} for title, body in bodies(operation, model).items()}
        made["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _shape(operation.body), "examples": examples}},
        }
    return made


def bodies(operation: Operation, model: str) -> dict[str, Json]:
    """An operation's examples, with the model's name where the request has one."""
    named = any(field.name == "model" for field in msgspec.structs.fields(operation.body))
    return {
        title: {"model": model, **body} if named else dict(body) for title, body in operation.examples.items()
    }


def _responses(operation: Operation) -> Json:
    good: Json = {operation.content_type: {"schema": {"type": "string"}}}
    if operation.answer is not None:
        good = {operation.content_type: {"schema": _shape(operation.answer)}}
    said = "OK"
    if operation.event is not None:
        said = f"The whole answer; with `stream`, events that are each a `{operation.event.__name__}`"
        good["text/event-stream"] = {
            "schema": _event(operation.event),
            "examples": {
                "How a stream looks": {
                    "value": f"data: {{a {operation.event.__name__}}}\n\ndata: {{the next}}\n\ndata: [DONE]\n\n"
                }
            },
        }
    responses = {"200": _response(said, good)}
    refusals = [*_ANY, *(() if operation.public else _KEYED), *operation.refusals]
    for status in sorted({refusal.status for refusal in refusals}):
        kinds = list(dict.fromkeys(refusal for refusal in refusals if refusal.status == status))
        responses[str(status)] = _refusal(kinds)
    if operation.unready:
        shape = {"oneOf": [_shape(operation.answer), _shape(errors.ErrorBody)]}
        responses["503"] = _response(
            "Not now: the body says which model is how", {"application/json": {"schema": shape}}
        )
    return responses


def _event(kind: Any) -> Json:
    """Each event of a stream: its data is JSON, but for the last."""
    known = {"anyOf": [_shape(kind), _shape(errors.ErrorBody)]}
    data = {
        "type": "string",
        "anyOf": [{"const": "[DONE]"}, {"contentMediaType": "application/json", "contentSchema": known}],
    }
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _refusal(kinds: Iterable[type[errors.ApiError]]) -> Json:
    """One status, with all that it may mean."""
    said = {kind.__name__: (kind.__doc__ or "").strip().partition("\n")[0] for kind in kinds}
    examples = {
        kind.__name__: {
            "summary": said[kind.__name__],
            "value": msgspec.json.decode(kind(said[kind.__name__]).body()),
        }
        for kind in kinds
    }
    content = {"schema": _shape(errors.ErrorBody), "examples": examples}
    return _response(" ".join(said.values()), {"application/json": content})


def _response(said: str, content: Json) -> Json:
    return {"description": said, "content": content}
