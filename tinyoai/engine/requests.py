"""Requests in the worker: their place in the queue, and their preparation into tasks.

Preparation renders the chat template, encodes the prompt and refuses what cannot be served. It runs in the
tokenizer thread beside a running step, since none of it touches a KV cache.
"""

import sys
from collections import deque
from collections.abc import Sequence

from tinyoai import wire
from tinyoai.engine import adapter_set, pair_prompt
from tinyoai.engine.contract import Capabilities, Copies, Engine, Truncates
from tinyoai.engine.generate import GenerateTask
from tinyoai.engine.prefix_store import common_prefix
from tinyoai.engine.rendering import ChatRenderer, RenderRefused
from tinyoai.engine.score import ScoreTask
from tinyoai.engine.tasks import Task
from tinyoai.text.segments import min_tokens, n_text_bytes
from tinyoai.text.template import Rendered


class QueuedRequest:
    """A request that has not ended: first in the queue, then in one or more slots."""

    __slots__ = (
        "accepted",
        "client",
        "deadline",
        "first",
        "group",
        "id",
        "n_cached",
        "n_open",
        "n_prompt",
        "queue_deadline",
        "queue_ms",
        "queued_at",
        "request",
        "started",
        "tasks",
    )

    def __init__(
        self, request: wire.Request, queued_at: float, queue_deadline: float, deadline: float
    ) -> None:
        self.id = request.id
        self.request = request
        self.client = request.client
        self.group = request.group or f"request {request.id}"
        self.queued_at = queued_at
        self.queue_deadline = queue_deadline
        self.deadline = deadline
        self.started = False
        """It is being prepared, or was."""
        self.tasks: deque[Task] = deque()
        """Tasks without a slot."""
        self.first: Task | None = None
        self.n_open = 0
        """Tasks that have not ended."""
        self.accepted = False
        self.n_prompt = 0
        self.n_cached = 0
        self.queue_ms = 0.0

    def ready(self) -> bool:
        """Its next task can get a slot. Choices that copy the first one's prompt wait for its prefill."""
        if not self.tasks:
            return False
        task, first = self.tasks[0], self.first
        copies = isinstance(task, GenerateTask) and task.copies_from_first
        return task is first or not copies or first is None or not first.prefilling


class Refused(Exception):
    """The request cannot be served as it is."""

    def __init__(self, message: str, *, kind: str = "BadRequest", param: str | None) -> None:
        super().__init__(message)
        self.kind = kind
        self.param = param


def prepare(request: wire.Request, engine: Engine, renderer: ChatRenderer) -> list[Task] | wire.Failed:
    """The tasks of a Generate, Embed or Rank, or its refusal."""
    body = request.body
    try:
        if isinstance(body, wire.Embed):
            return [_embed(request.id, body, engine, renderer)]
        if isinstance(body, wire.Rank):
            return [_score(request.id, body, engine)]
        if isinstance(body, wire.Generate):
            return _generate(request.id, body, engine, renderer)
        raise TypeError(f"{type(body).__name__} needs no slot")
    except Refused as error:
        return wire.Failed(id=request.id, kind=error.kind, message=str(error), param=error.param)
    except Exception as error:  # one request's fault must not end the thread that serves all
        print(f"request {request.id}: {type(error).__name__}: {error}", file=sys.stderr)
        return wire.Failed(id=request.id, kind="InternalError", message="the prompt could not be read")


def _render(prompt: wire.Prompt, renderer: ChatRenderer, param: str) -> Rendered:
    """A prompt's segments, and the stop strings of its chat format. Raises Refused."""
    try:
        return renderer.render(prompt)
    except RenderRefused as error:
        kind = "ContextLengthExceeded" if error.too_long else "BadRequest"
        raise Refused(str(error), kind=kind, param=param) from None


def _generate(request_id: int, body: wire.Generate, engine: Engine, renderer: ChatRenderer) -> list[Task]:
    if not engine.caps.generates:
        able = (
            "makes embeddings and no text; send the text to /v1/embeddings"
            if engine.info.n_embd_out
            else "ranks documents and writes no text; send a query and documents to /v1/rerank"
        )
        raise Refused(f"{engine.info.name} {able}", param="model")
    rendered = _render(body.prompt, renderer, body.param)
    segments = rendered.segments
    ids = _encode(segments, engine, body.param, n_answer=1)
    n_vocab = engine.info.n_vocab
    for token in body.sampling.logit_bias:
        if not 0 <= token < n_vocab:
            raise Refused(
                f"token {token} is not in this model's vocabulary (0 to {n_vocab - 1})", param="logit_bias"
            )
    adapters = _adapters(body.adapters, engine)
    text = prompt_text(segments, ids, engine) if body.echo else ""
    copies = engine.caps.copies is not Copies.NONE
    caps = engine.caps
    n_resumable = 0
    if caps.saves and not caps.cuts_states:
        n_resumable = resumable(body.prompt, segments, ids, engine)
    return [
        GenerateTask(
            request_id,
            choice,
            body,
            ids,
            engine,
            stop=[*body.stop, *rendered.stop],
            prompt_text=text,
            copies_from_first=copies and choice > 0,
            adapters=adapters,
            n_resumable=n_resumable,
            checkpoint=n_resumable if _needs_checkpoint(caps, body.n) else 0,
        )
        for choice in range(body.n)
    ]


def _adapters(asked: Sequence[wire.Adapter] | None, engine: Engine) -> tuple[wire.Adapter, ...]:
    """The LoRA adapters of a request. Raises Refused."""
    try:
        return adapter_set.chosen(asked, engine.info.adapters)
    except ValueError as error:
        raise Refused(f"lora: {error}", param="lora") from None


def _embed(request_id: int, body: wire.Embed, engine: Engine, renderer: ChatRenderer) -> Task:
    from tinyoai.engine.embed import EmbedTask  # imports numpy, which most workers never need

    info = engine.info
    if not info.n_embd_out and engine.caps.pair:
        raise Refused(
            f"{info.name} ranks documents and makes no embeddings; send a query and documents to /v1/rerank",
            param="model",
        )
    if not info.n_embd_out:
        raise Refused(
            f"{info.name} cannot embed: the engine keeps no hidden states of the architecture "
            f"{info.architecture}",
            param="model",
        )
    if body.dimensions > info.n_embd_out:
        raise Refused(
            f"dimensions: an embedding of {info.name} has {info.n_embd_out} numbers; ask for at most that many",
            param="dimensions",
        )
    segments = _render(body.prompt, renderer, body.param).segments
    if info.add_eos and isinstance(segments[-1], wire.Text):
        segments = [*segments, wire.Special("eos")]
    ids = _encode(segments, engine, body.param, n_answer=0)
    return EmbedTask(request_id, body, ids, engine)


def _score(request_id: int, body: wire.Rank, engine: Engine) -> Task:
    form = engine.caps.pair
    if form is None:
        raise Refused(
            f"{engine.info.name} cannot rank: it has no rank head; choose a reranker", param="model"
        )
    segments = pair_prompt.segments(body.query, body.document, form, engine.info.special)
    ids = _encode(segments, engine, body.param, n_answer=0, what=f"the query with {body.param}")
    return ScoreTask(request_id, ids, engine)


def _encode(
    segments: Sequence[wire.Segment], engine: Engine, param: str, n_answer: int, what: str = "the prompt"
) -> list[int]:
    """The prompt's ids. Raises Refused if it is empty, wrong or too long."""
    n_ctx = engine.info.n_ctx

    field = param if "[" in param else f"the {param}"

    def too_long(n_prompt: int, at_least: str = "") -> Refused:
        return Refused(
            f"{what} has {at_least}{n_prompt} tokens, but the context window of this model is "
            f"{n_ctx} tokens{', the answer included' if n_answer else ''}; shorten {field}",
            kind="ContextLengthExceeded",
            param=param,
        )

    fewest = min_tokens(n_text_bytes(segments), engine.caps.longest_piece)
    if fewest + n_answer > n_ctx:
        raise too_long(fewest, "at least ")
    try:
        ids = engine.encode(segments)
    except ValueError as error:
        raise Refused(str(error), param=param) from None
    if not ids:
        raise Refused(
            "the prompt is empty and this model has no token to begin with; send some text", param=param
        )
    if len(ids) + n_answer > n_ctx:
        raise too_long(len(ids))
    return ids


def _needs_checkpoint(caps: Capabilities, n: int) -> bool:
    """Whether what follows a prompt in its sequence cannot be dropped later, or not in the copies for other choices."""
    return caps.truncates is Truncates.NEVER or (n > 1 and not caps.shares_cells)


def resumable(
    prompt: wire.Prompt, segments: Sequence[wire.Segment], ids: Sequence[int], engine: Engine
) -> int:
    """The prompt tokens that a longer or another continuation of it begins with too.

    Of a conversation these end with its last message, before the words that open the answer. The last token of a
    prompt is evaluated in any case.
    """
    n = len(ids)
    if isinstance(prompt, wire.Conversation):
        said = next((m.content.strip() for m in reversed(prompt.messages) if m.role != "assistant"), "")
        for end in range(len(segments), 0, -1):
            segment = segments[end - 1]
            if said and isinstance(segment, wire.Text | wire.Markup) and said[-40:] in segment.text:
                n = common_prefix(engine.encode(segments[:end]), ids)
                break
    return min(n, len(ids) - 1)


def prompt_text(segments: Sequence[wire.Segment], ids: Sequence[int], engine: Engine) -> str:
    """The prompt as text, without control tokens."""
    texts = [s.text for s in segments if isinstance(s, wire.Text)]
    if texts and all(isinstance(s, wire.Text | wire.Special) for s in segments):
        return "".join(texts)
    whole = b"".join(engine.piece(token) for token in ids)
    if engine.info.add_space_prefix and whole.startswith(b" "):
        whole = whole[1:]
    return whole.decode("utf-8", "replace")
