"""POST /v1/completions: continues raw prompts, without roles or a template."""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from tinyoai import errors, wire
from tinyoai.api import decode, generation
from tinyoai.api.decode import TokenId
from tinyoai.api.generation import Answer, Choice
from tinyoai.api.openai.chat import Format, generate, timings, usage
from tinyoai.api.openai.chat_types import Choices, Generation, Timings, Usage
from tinyoai.models.pool import Pool
from tinyoai.web.exchange import Exchange

DEFAULT_MAX_TOKENS = 256
MAX_PROMPTS = 128


class CompletionRequest(Generation, frozen=True, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        str | list[str | TokenId | list[TokenId]],
        Meta(description="A text, several texts, token ids, or several lists of token ids."),
    ]
    suffix: Annotated[
        str | None, Meta(description="The text after a gap. Refused: the models have no infill tokens.")
    ] = None
    echo: Annotated[
        bool | None,
        Meta(
            description="Begin the answer with the prompt, with its log-probabilities if `logprobs` is set."
        ),
    ] = None
    logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=5)] | None,
        Meta(description="Return the log-probability of each token, and this many alternatives."),
    ] = None
    best_of: Annotated[
        Choices | None,
        Meta(description="Generate this many answers and return the `n` likeliest; not with `stream`."),
    ] = None


class CompletionLogprobs(Struct, kw_only=True):
    """Log-probabilities as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, kw_only=True):
    """An answer, or a piece of one in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(Struct, kw_only=True):
    """The answer of POST /v1/completions, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    timings: Timings | msgspec.UnsetType = msgspec.UNSET


class Completions:
    """The endpoint."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __call__(self, exchange: Exchange) -> None:
        """Answers one request. Raises errors.ApiError."""
        request = decode.decode(CompletionRequest, await exchange.read_body())
        check(request)
        given = prompts(request)
        n = request.n or 1
        best_of = request.best_of or n
        if len(given) * best_of > MAX_PROMPTS:
            raise errors.BadRequest(
                f"{len(given)} prompts with {best_of} answers each exceed the {MAX_PROMPTS} answers of one "
                "request; send several requests",
                param="prompt",
            )
        logprobs = -1 if request.logprobs is None else request.logprobs
        if best_of > n:
            logprobs = max(0, logprobs)  # they rank the answers
        async with self._pool.lease(request.model, decode.keep_alive(request.keep_alive)) as lease:
            max_tokens = request.max_tokens
            if max_tokens is None:
                max_tokens = lease.defaults.max_tokens or DEFAULT_MAX_TOKENS
            bodies = [
                generate(
                    request,
                    _segments(prompt),
                    lease.defaults,
                    n=best_of,
                    max_tokens=max_tokens,
                    logprobs=logprobs,
                    score_end=True,
                    echo=bool(request.echo),
                    param="prompt",
                )
                for prompt in given
            ]
            if request.stream:
                await generation.stream(
                    exchange, lease, bodies, lambda answer: _CompletionFormat(answer, lease.name, request)
                )
                return
            answer = await generation.fold(exchange, lease, bodies)
            name = lease.name
        body = Completion(
            id=generation.new_id("cmpl"),
            created=generation.now(),
            model=name,
            system_fingerprint=generation.fingerprint(answer.ready),
            choices=[
                CompletionChoice(
                    index=index,
                    text=choice.text,
                    logprobs=_logprobs(choice.logprobs, 0) if request.logprobs is not None else None,
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(_best(answer, n))
            ],
            usage=usage(answer),
            timings=timings(answer, answer.choices),
        )
        exchange.respond(200, decode.encode(body))


def check(request: CompletionRequest) -> None:
    """Raises errors.BadRequest for fields that contradict each other or are not supported."""
    if request.suffix:
        raise errors.BadRequest("suffix: this model has no infill tokens; remove it", param="suffix")
    if request.best_of is not None:
        if request.best_of < (request.n or 1):
            raise errors.BadRequest("best_of must be at least n", param="best_of")
        if request.stream and request.best_of > (request.n or 1):
            raise errors.BadRequest(
                "best_of cannot be streamed: the best answers are known only at the end", param="best_of"
            )


def prompts(request: CompletionRequest) -> list[str | list[int]]:
    """Returns the prompts: texts or token ids. Raises errors.BadRequest."""
    found = decode.texts_or_ids(request.prompt, "prompt", MAX_PROMPTS)
    for prompt in found:
        if isinstance(prompt, str):
            decode.reject_nul("prompt", prompt)
    return found


def _segments(prompt: str | list[int]) -> list[wire.Segment]:
    return [wire.Special("bos"), wire.Text(prompt)] if isinstance(prompt, str) else [wire.Ids(prompt)]


def _best(answer: Answer, n: int) -> list[Choice]:
    """The n likeliest choices of each prompt."""
    if n == answer.n:
        return answer.choices
    return [
        choice
        for at in range(0, len(answer.choices), answer.n)
        for choice in sorted(answer.choices[at : at + answer.n], key=_likelihood, reverse=True)[:n]
    ]


def _likelihood(choice: Choice) -> float:
    """The mean log-probability of its tokens."""
    known = [entry.logprob for entry in choice.logprobs if entry.logprob is not None]
    return sum(known) / len(known) if known else 0.0


def _logprobs(entries: Sequence[wire.TokenLogprob], offset: int) -> CompletionLogprobs:
    """`offset` is where the first token begins, in characters of the whole text."""
    tokens = [_text(entry.piece) for entry in entries]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[entry.logprob for entry in entries],
        top_logprobs=[
            None if entry.logprob is None else _top(entry.piece, entry.logprob, entry.top)
            for entry in entries
        ],
        text_offset=offsets,
    )


def _top(chosen: bytes, logprob: float, top: Sequence[tuple[bytes, float]]) -> dict[str, float]:
    """The likeliest tokens and the chosen one. Of tokens with equal texts the likeliest stays."""
    found: dict[str, float] = {}
    for piece, value in [*top, (chosen, logprob)]:
        found.setdefault(_text(piece), value)
    return found


def _text(piece: bytes) -> str:
    """A token as text; bytes that are no code point by themselves become U+FFFD."""
    return piece.decode("utf-8", "replace")


class _CompletionFormat(Format[Completion]):
    """The stream: each event is a completion object with a piece of text."""

    def __init__(self, answer: Answer, model: str, request: CompletionRequest) -> None:
        blank = Completion(
            id=generation.new_id("cmpl"),
            created=generation.now(),
            model=model,
            system_fingerprint=generation.fingerprint(answer.ready),
            choices=[],
        )
        super().__init__(answer, blank, request)
        self._with_logprobs = request.logprobs is not None
        self._offsets: dict[int, int] = {}

    def first(self, index: int) -> None:
        return None

    def content(self, index: int, event: wire.Content) -> bytes:
        logprobs = None
        if self._with_logprobs:
            offset = self._offsets.get(index, 0)
            logprobs = _logprobs(event.logprobs, offset)
            self._offsets[index] = offset + sum(len(token) for token in logprobs.tokens)
        return self._chunk([CompletionChoice(index=index, text=event.text, logprobs=logprobs)])

    def last(self, index: int) -> bytes:
        choice = self.answer.choices[index]
        end = CompletionChoice(index=index, text="", finish_reason=choice.finish_reason)
        return self._chunk([end], timings=timings(self.answer, [choice]))
