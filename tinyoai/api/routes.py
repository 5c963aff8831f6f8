"""The table of routes: the router, the access rules and the OpenAPI document are made from it.

A new endpoint is one entry in ROUTES, and its examples in `api.examples`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from tinyoai import errors
from tinyoai.api.docs import Docs
from tinyoai.api.finetune import Finetunes
from tinyoai.api.finetune_types import (
    FinetuneJobs,
    FinetuneRequest,
    FinetuneStarted,
    FinetuneStatus,
    FinetuneStopped,
)
from tinyoai.api.health import Health, Liveness, Readiness
from tinyoai.api.metrics import Metrics
from tinyoai.api.models import (
    LoadRequest,
    Model,
    ModelAction,
    ModelDeleted,
    ModelList,
    ModelRequest,
    Models,
    ModelsStatus,
)
from tinyoai.api.openai.chat import Chat
from tinyoai.api.openai.chat_types import ChatChunk, ChatCompletion, ChatRequest
from tinyoai.api.openai.completions import Completion, CompletionRequest, Completions
from tinyoai.api.openai.embeddings import EmbeddingList, EmbeddingRequest, Embeddings
from tinyoai.api.rerank import Rerank, RerankAnswer, RerankRequest, ScoredText
from tinyoai.api.tokenizer import (
    AppliedTemplate,
    Detokenized,
    DetokenizeRequest,
    TemplateRequest,
    Tokenized,
    Tokenizer,
    TokenizeRequest,
    TokenizerInfo,
)
from tinyoai.web.routing import Handler, Router

Refusals = tuple[type[errors.ApiError], ...]

_BODY: Refusals = (
    errors.InvalidJson,
    errors.RequestTimeout,
    errors.PayloadTooLarge,
    errors.UnsupportedMediaType,
    errors.ExpectationFailed,
)
"""Of every request with a body."""
_MODEL: Refusals = (errors.ModelNotFound, errors.ModelLoading, errors.ModelFailed, errors.InsufficientMemory)
"""Of every request that names a model."""
_RUN: Refusals = (
    errors.ContextLengthExceeded,
    errors.RequestTimeout,
    errors.Overloaded,
    errors.ModelError,
    errors.WorkerDied,
)
"""Of every request that a model evaluates."""


class Endpoints(NamedTuple):
    """The objects that have the handlers."""

    chat: Chat
    completions: Completions
    embeddings: Embeddings
    rerank: Rerank
    tokenizer: Tokenizer
    models: Models
    finetunes: Finetunes
    health: Health
    metrics: Metrics
    docs: Docs


class Route(NamedTuple):
    """One method of one path."""

    method: str
    path: str
    """With /v1 where OpenAI has it; the router takes both forms. {name:path} takes the rest of a path."""
    handler: Callable[[Endpoints], Handler]
    tag: str = ""
    """The group in the documentation; empty: not documented."""
    id: str = ""
    summary: str = ""
    description: str = ""
    request: Any = None
    """The type of the body."""
    answer: Any = None
    """The type of a 200; None: not JSON. dict: any object."""
    event: Any = None
    """The type of a stream's events, if the route can stream."""
    content_type: str = "application/json"
    refusals: Refusals = ()
    """Errors of this route, in addition to those of every route."""
    answers_503: bool = False
    """A 503 may have the body of a 200."""
    public: bool = False
    """Needs no API key and counts for no rate limit."""
    local_pages: bool = True
    """Pages from other loopback origins may use it, if the server listens on a loopback address."""

    @property
    def name(self) -> str:
        """The route as the router and `Exchange.route` have it."""
        return self.path.removeprefix("/v1").replace(":path}", "}")


ROUTES: tuple[Route, ...] = (
    Route(
        "POST",
        "/v1/chat/completions",
        lambda e: e.chat,
        tag="Answers",
        id="createChatCompletion",
        summary="Answer a conversation",
        description="Answers the last message. With `stream` the answer comes as server-sent events: each `data:` line "
        "is a `ChatChunk`, and `data: [DONE]` ends it.",
        request=ChatRequest,
        answer=ChatCompletion,
        event=ChatChunk,
        refusals=(*_BODY, *_MODEL, *_RUN),
    ),
    Route(
        "POST",
        "/v1/completions",
        lambda e: e.completions,
        tag="Answers",
        id="createCompletion",
        summary="Continue a text",
        description="The legacy endpoint, without roles or a template. With `stream` each `data:` line is a "
        "`Completion` with a piece of the text, and `data: [DONE]` ends it.",
        request=CompletionRequest,
        answer=Completion,
        event=Completion,
        refusals=(*_BODY, *_MODEL, *_RUN),
    ),
    Route(
        "POST",
        "/v1/embeddings",
        lambda e: e.embeddings,
        tag="Answers",
        id="createEmbedding",
        summary="Embed texts",
        description="Returns one vector of length 1 for each input, in order. Similar texts have similar vectors. "
        "The inputs of a request are evaluated in parallel, as far as there are free slots.",
        request=EmbeddingRequest,
        answer=EmbeddingList,
        refusals=(*_BODY, *_MODEL, *_RUN),
    ),
    Route(
        "POST",
        "/v1/rerank",
        lambda e: e.rerank,
        tag="Answers",
        id="rerank",
        summary="Rank documents by a query",
        description="Returns the documents' scores, best first, in the shape of Jina and Cohere; with `texts` a bare "
        "list, as TEI has it. The model must have a rank head. Its scores are returned as they are, and their range "
        "depends on the model. `/v1/reranking` and `/v2/rerank` are the same.",
        request=RerankRequest,
        answer=RerankAnswer | list[ScoredText],
        refusals=(*_BODY, *_MODEL, *_RUN),
    ),
    Route("POST", "/v1/reranking", lambda e: e.rerank),
    Route("POST", "/v2/rerank", lambda e: e.rerank),
    Route(
        "POST",
        "/tokenize",
        lambda e: e.tokenizer.tokenize,
        tag="Answers",
        id="tokenize",
        summary="Turn a text into tokens",
        description="A text never becomes control tokens. `max_model_len` is the context window. This needs no "
        "slot, so it answers while all are busy.",
        request=TokenizeRequest,
        answer=Tokenized,
        refusals=(*_BODY, *_MODEL),
    ),
    Route(
        "POST",
        "/detokenize",
        lambda e: e.tokenizer.detokenize,
        tag="Answers",
        id="detokenize",
        summary="Turn tokens into a text",
        request=DetokenizeRequest,
        answer=Detokenized,
        refusals=(*_BODY, *_MODEL),
    ),
    Route(
        "GET",
        "/tokenizer_info",
        lambda e: e.tokenizer.info,
        tag="Answers",
        id="tokenizerInfo",
        summary="Describe the default model's vocabulary",
        description="Evaluation programs such as lm-evaluation-harness read this before they tokenize.",
        answer=TokenizerInfo,
        refusals=_RUN,
    ),
    Route(
        "POST",
        "/apply-template",
        lambda e: e.tokenizer.apply_template,
        tag="Answers",
        id="applyTemplate",
        summary="Show the prompt of a conversation",
        description="Returns the prompt of a chat request with these messages, and its length in tokens.",
        request=TemplateRequest,
        answer=AppliedTemplate,
        refusals=(*_BODY, *_MODEL),
    ),
    Route(
        "GET",
        "/v1/models",
        lambda e: e.models.list,
        tag="Models",
        id="listModels",
        summary="List the models",
        answer=ModelList,
    ),
    Route(
        "GET",
        "/v1/models/status",
        lambda e: e.models.status,
        tag="Models",
        id="modelsStatus",
        summary="Model status",
        description="State, uptime, worker process, memory, slots, queue and speed of each model. Models whose file is "
        "gone or cannot be served are listed with the reason.",
        answer=ModelsStatus,
    ),
    Route(
        "POST",
        "/v1/models/load",
        lambda e: e.models.load,
        tag="Models",
        id="loadModel",
        summary="Load a model",
        description="Answers when it is loaded. The first request that names a model loads it too.",
        request=LoadRequest,
        answer=ModelAction,
        refusals=(*_BODY, *_MODEL),
        local_pages=False,
    ),
    Route(
        "POST",
        "/v1/models/unload",
        lambda e: e.models.unload,
        tag="Models",
        id="unloadModel",
        summary="Unload a model",
        description="Frees its memory at once, or after its running answers. The next request loads it again.",
        request=ModelRequest,
        answer=ModelAction,
        refusals=(*_BODY, errors.ModelNotFound),
        local_pages=False,
    ),
    Route(
        "DELETE",
        "/v1/models/{id:path}",
        lambda e: e.models.remove,
        tag="Models",
        id="deleteModel",
        summary="Remove a model from the registry",
        description="Its file stays. The model given at start and those in the models folder cannot be removed.",
        answer=ModelDeleted,
        refusals=(errors.ModelNotFound,),
        local_pages=False,
    ),
    Route(
        "GET",
        "/v1/models/{id:path}",
        lambda e: e.models.one,
        tag="Models",
        id="retrieveModel",
        summary="Describe one model",
        description="The id may contain slashes.",
        answer=Model,
        refusals=(errors.ModelNotFound,),
    ),
    Route(
        "POST",
        "/api/finetune/start",
        lambda e: e.finetunes.start,
        tag="Fine-tuning",
        id="startFinetune",
        summary="Fine-tune a model on examples",
        description="Trains LoRA adapters, or the matrices themselves with `use_lora: false`. One job runs at a time, "
        "in a process of its own at the lowest priority. The new model is registered when the job is completed. Needs "
        "the extra `finetune`.",
        request=FinetuneRequest,
        answer=FinetuneStarted,
        refusals=(
            *_BODY,
            errors.NotFound,
            errors.ModelNotFound,
            errors.InsufficientMemory,
            errors.Overloaded,
        ),
        local_pages=False,
    ),
    Route(
        "GET",
        "/api/finetune/jobs",
        lambda e: e.finetunes.all,
        tag="Fine-tuning",
        id="listFinetunes",
        summary="List the fine-tuning jobs",
        answer=FinetuneJobs,
        local_pages=False,
    ),
    Route(
        "GET",
        "/api/finetune/status/{job_id:path}",
        lambda e: e.finetunes.status,
        tag="Fine-tuning",
        id="finetuneStatus",
        summary="Fine-tuning status",
        description="With the job's learning curve, of at most 1,000 points, and the last lines of its log.",
        answer=FinetuneStatus,
        refusals=(errors.NotFound,),
        local_pages=False,
    ),
    Route(
        "POST",
        "/api/finetune/stop/{job_id:path}",
        lambda e: e.finetunes.stop,
        tag="Fine-tuning",
        id="stopFinetune",
        summary="Stop a fine-tuning job",
        description="A job that has ended stays as it is. Other jobs are stopped by the server that runs them.",
        answer=FinetuneStopped,
        refusals=(errors.BadRequest, errors.NotFound),
        local_pages=False,
    ),
    Route(
        "GET",
        "/health",
        lambda e: e.health.ready,
        tag="Operation",
        id="health",
        summary="Readiness probe",
        description="200 while requests can be answered, else 503 with the same body: `status` and the state of each "
        "model.",
        answer=Readiness,
        answers_503=True,
        public=True,
    ),
    Route(
        "GET",
        "/health/ready",
        lambda e: e.health.ready,
        tag="Operation",
        id="ready",
        summary="Readiness probe",
        description="The same as `/health`.",
        answer=Readiness,
        answers_503=True,
        public=True,
    ),
    Route(
        "GET",
        "/health/live",
        lambda e: e.health.live,
        tag="Operation",
        id="live",
        summary="Liveness probe",
        description="200 while the process answers.",
        answer=Liveness,
        public=True,
    ),
    Route(
        "GET",
        "/metrics",
        lambda e: e.metrics,
        tag="Operation",
        id="metrics",
        summary="Prometheus metrics",
        description="Times to the first token and per token, waits, tokens, cache reuse, requests by route and status, "
        "states and memory of the models. Needs the extra `metrics`; without it a 404 says so.",
        content_type="text/plain",
        refusals=(errors.NotFound,),
        local_pages=False,
    ),
    Route(
        "GET",
        "/openapi.json",
        lambda e: e.docs.openapi,
        tag="Operation",
        id="openapi",
        summary="This document",
        answer=dict,
        public=True,
    ),
    Route(
        "GET",
        "/docs",
        lambda e: e.docs.page,
        tag="Operation",
        id="docs",
        summary="This document as a page",
        content_type="text/html",
        public=True,
    ),
    Route("GET", "/", lambda e: e.docs.home, public=True),
    Route("GET", "/docs/{name:path}", lambda e: e.docs.file, public=True),
)
"""Every route, in the order of the documentation."""

PUBLIC = frozenset(route.name for route in ROUTES if route.public)
"""Routes that need no API key."""


def router(endpoints: Endpoints) -> Router:
    """Returns the router of all routes."""
    found = Router(prefixes=("/v1",), help_path="/docs")
    for route in ROUTES:
        found.add(route.method, route.path, route.handler(endpoints), route.local_pages)
    return found
