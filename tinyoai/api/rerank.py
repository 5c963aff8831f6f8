"""POST /v1/rerank: how well each document answers a query, in the shapes of Jina, Cohere and TEI.

The scores are the model's own, as llama.cpp's server returns them.
"""

from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, Struct

from tinyoai import errors, wire
from tinyoai.api import decode, generation
from tinyoai.api.decode import KeepAlive, ModelName, Natural
from tinyoai.models.catalog import MAX_SHOWN
from tinyoai.models.pool import Pool
from tinyoai.web.exchange import Exchange

if TYPE_CHECKING:
    from tinyoai.models.pool import Lease

MAX_DOCUMENTS = 1000
MAX_QUERY_BYTES = 16 << 20
"""Of the query, once for each document: so often the worker gets it."""


class RerankDocument(Struct, kw_only=True):
    """A document as an object. Other fields of it are ignored."""

    text: Annotated[str, Meta(description="The document.")]


class RerankRequest(Struct, kw_only=True):
    """The body of POST /v1/rerank."""

    query: Annotated[str, Meta(description="The question or search words; not empty.")]
    model: Annotated[
        ModelName | None,
        Meta(description="An id from `GET /v1/models`; without it, the server's default model."),
    ] = None
    documents: Annotated[
        list[str | RerankDocument] | None,
        Meta(description='1 to 1,000 documents, as texts or `{"text": ...}`.'),
    ] = None
    texts: Annotated[
        list[str] | None,
        Meta(description="TEI's name of `documents`. The answer is then a bare list, as TEI has it."),
    ] = None
    top_n: Annotated[
        Natural | None, Meta(description="Return the best ones only; all if it is left out.")
    ] = None
    return_documents: Annotated[bool | None, Meta(description="Return each document's text too.")] = None
    return_text: Annotated[bool | None, Meta(description="TEI's name of `return_documents`.")] = None
    keep_alive: KeepAlive | None = None


class RerankResult(Struct, kw_only=True, omit_defaults=True):
    """A document: its place in the request and its score. Larger is better; the range depends on the model."""

    index: int
    relevance_score: float
    document: RerankDocument | None = None


class RerankUsage(Struct, kw_only=True):
    """Tokens that were read. The query counts once for each document."""

    prompt_tokens: int
    total_tokens: int


class RerankTokens(Struct, kw_only=True):
    """Tokens that were read, under Cohere's name."""

    input_tokens: int


class RerankMeta(Struct, kw_only=True):
    """The part of Cohere's `meta` that applies here."""

    tokens: RerankTokens


class RerankAnswer(Struct, kw_only=True):
    """The answer of POST /v1/rerank: the best document comes first, and equal ones stay in order."""

    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[RerankResult]
    usage: RerankUsage
    meta: RerankMeta


class ScoredText(Struct, kw_only=True, omit_defaults=True):
    """A document in TEI's answer."""

    index: int
    score: float
    text: str | None = None


class Rerank:
    """The endpoint."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __call__(self, exchange: Exchange) -> None:
        """Answers one request. Raises errors.ApiError."""
        request = decode.decode(RerankRequest, await exchange.read_body())
        field, texts = _texts(request)
        name = await self._ranker(request.model or self._pool.default.name)
        async with self._pool.lease(name, decode.keep_alive(request.keep_alive)) as lease:
            scores, n_prompt = await _score(exchange, lease, request.query, field, texts)
        found = sorted(range(len(texts)), key=lambda i: (-scores[i], i))[: request.top_n]
        if request.texts is not None:
            rows = [
                ScoredText(index=i, score=scores[i], text=texts[i] if request.return_text else None)
                for i in found
            ]
            exchange.respond(200, decode.encode(rows))
            return
        results = [
            RerankResult(
                index=i,
                relevance_score=scores[i],
                document=RerankDocument(text=texts[i]) if request.return_documents else None,
            )
            for i in found
        ]
        answer = RerankAnswer(
            id=generation.new_id("rerank"),
            model=name,
            results=results,
            usage=RerankUsage(prompt_tokens=n_prompt, total_tokens=n_prompt),
            meta=RerankMeta(tokens=RerankTokens(input_tokens=n_prompt)),
        )
        exchange.respond(200, decode.encode(answer))

    async def _ranker(self, name: str) -> str:
        """Returns the id of a model that can rank. Raises errors.ModelNotFound or BadRequest, and loads nothing."""
        model = (await self._pool.lookup(name)).model
        if model.can_rank:
            return model.name
        able = sorted(other.name for other in self._pool.catalog.view.models.values() if other.can_rank)
        more = f", and {len(able) - MAX_SHOWN} more" if len(able) > MAX_SHOWN else ""
        hint = (
            f"these models can: {', '.join(able[:MAX_SHOWN])}{more}"
            if able
            else "no served model can; add a reranker in GGUF, such as bge-reranker-v2-m3, to the models folder"
        )
        raise errors.BadRequest(f"{model.name} cannot rank documents; {hint}", param="model")


async def _score(
    exchange: Exchange, lease: "Lease", query: str, field: str, texts: list[str]
) -> tuple[list[float], int]:
    """Returns the score of each document and the number of tokens that were read. Raises errors.ApiError."""
    due = generation.deadline(exchange)
    await lease.ready(due)
    bodies = [wire.Rank(query=query, document=text, param=f"{field}[{i}]") for i, text in enumerate(texts)]
    scores: dict[int, float] = {}
    n_prompt, n_done, queue_ms = 0, 0, 0.0
    async with aclosing(
        lease.run(bodies, client=exchange.client, scope=exchange.scope, deadline=due)
    ) as events:
        async for index, event in events:
            if isinstance(event, wire.Accepted):
                queue_ms = max(queue_ms, event.queue_ms)
            elif isinstance(event, wire.Score):
                scores[index] = event.value
            elif isinstance(event, wire.Done):
                n_done += 1
                n_prompt += event.n_prompt
                exchange.n_tokens += event.n_prompt
            elif isinstance(event, wire.Failed):
                raise generation.failure(event)
    if not len(scores) == n_done == len(texts):
        raise errors.InternalError("the model's process returned fewer scores than requested")
    generation.add_queue_header(exchange, queue_ms)
    return [scores[i] for i in range(len(texts))], n_prompt


def _texts(request: RerankRequest) -> tuple[str, list[str]]:
    """Returns the name of the field with the documents, and their texts. Raises errors.BadRequest."""
    field, given = ("documents", request.documents) if request.texts is None else ("texts", request.texts)
    if given is None:
        raise errors.BadRequest("the field 'documents' is required", param="documents")
    if request.documents is not None and request.texts is not None:
        raise errors.BadRequest("documents and texts name the same; send one of them", param="texts")
    if not given:
        raise errors.BadRequest(f"{field}: the list is empty", param=field)
    if len(given) > MAX_DOCUMENTS:
        raise errors.BadRequest(
            f"{field}: there are {len(given)} documents; at most {MAX_DOCUMENTS} can be ranked at once",
            param=field,
        )
    if not request.query:
        raise errors.BadRequest("query: must not be empty", param="query")
    decode.reject_nul("query", request.query)
    if len(request.query.encode("utf-8", "replace")) * len(given) > MAX_QUERY_BYTES:
        raise errors.BadRequest(
            f"query: it is read once with each of {len(given)} documents, which is over {MAX_QUERY_BYTES >> 20} MiB of "
            "text; shorten it",
            param="query",
        )
    texts = [item if isinstance(item, str) else item.text for item in given]
    for i, text in enumerate(texts):
        decode.reject_nul(f"{field}[{i}]", text)
    return field, texts
