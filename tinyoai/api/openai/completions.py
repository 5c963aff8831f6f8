"""POST /v1/completions: the legacy endpoint, a prompt in and its continuation out.

Owns what such a request means and how its answers are worded. It must not know tokens, nor how
events are merged and sent.
"""

from collections.abc import Sequence
from functools import partial

from tinyoai import wire
from tinyoai.api import generation, schema
from tinyoai.models.pool import Lease, Pool
from tinyoai.web.exchange import Exchange

DEFAULT_MAX_TOKENS = 16


class Completions:
    """The endpoint."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __call__(self, exchange: Exchange) -> None:
        """Answers one request. Raises errors.ApiError for all that can be refused."""
        request = schema.completion_request(await exchange.read_body())
        async with self._pool.lease(request.model, schema.keep_alive(request.keep_alive)) as lease:
            schema.settle(request, lease.model, lease.defaults)
            await self._answer(exchange, request, lease)

    async def _answer(self, exchange: Exchange, request: schema.CompletionRequest, lease: Lease) -> None:
        ready, n = lease.ready, request.n or 1
        best_of = request.best_of or n
        prompts = schema.prompts(request)
        if len(prompts) * best_of > schema.MAX_PROMPTS:
            raise schema.too_many(len(prompts), best_of)
        makes = self._makes(exchange, request, prompts, best_of)
        if request.stream:
            await generation.stream(exchange, lease, makes, _Chunks(request, ready, n))
            return
        folded = await generation.fold(exchange, generation.events(lease, makes), len(makes))
        dones = [choice.done for choice in folded if choice.done]
        chosen = [
            choice
            for at in range(0, len(folded), best_of)
            for choice in sorted(folded[at : at + best_of], key=_likelihood, reverse=best_of > n)[:n]
        ]
        body = schema.Completion(
            id=generation.new_id("cmpl"),
            created=generation.now(),
            model=request.model,
            system_fingerprint=generation.fingerprint(ready),
            choices=[
                schema.CompletionChoice(
                    index=index,
                    text=choice.text,
                    logprobs=_logprobs(choice.logprobs, 0) if request.logprobs is not None else None,
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(chosen)
            ],
            usage=generation.usage(dones, best_of),
            timings=generation.timings(dones),
        )
        exchange.respond(200, generation.encode(body))

    def _makes(
        self,
        exchange: Exchange,
        request: schema.CompletionRequest,
        prompts: Sequence[str | list[int]],
        best_of: int,
    ) -> list[generation.Make]:
        base = generation.sampling(request)
        standing = generation.standing(exchange, streamed=bool(request.stream))
        max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        logprobs = -1 if request.logprobs is None else request.logprobs
        if best_of > (request.n or 1):
            logprobs = max(0, logprobs)

        def make(prompt: str | list[int], index: int, call_id: int) -> wire.Generate:
            segments: list[wire.Segment] = (
                [wire.Special("bos"), wire.Text(prompt)] if isinstance(prompt, str) else [wire.Ids(prompt)]
            )
            return wire.Generate(
                id=call_id,
                prompt=segments,
                sampling=generation.seeded(base, index),
                max_tokens=max_tokens,
                min_tokens=request.min_tokens or 0,
                stop=schema.stops(request),
                ignore_eos=bool(request.ignore_eos),
                exact=generation.repeatable(request),
                logprobs=logprobs,
                score_end=True,
                echo=bool(request.echo),
                param="prompt",
                **standing,
            )

        return [partial(make, prompt, index) for prompt in prompts for index in range(best_of)]


def _likelihood(choice: generation.Folded) -> float:
    """The mean log-probability of its tokens: what best_of ranks by."""
    known = [entry.logprob for entry in choice.logprobs if entry.logprob is not None]
    return sum(known) / len(known) if known else 0.0


def _logprobs(entries: Sequence[wire.TokenLogprob], offset: int) -> schema.CompletionLogprobs:
    """The legacy form; `offset` is where the first token begins, in characters of the whole text."""
    tokens = [generation.text(entry.piece) for entry in entries]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return schema.CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[entry.logprob for entry in entries],
        top_logprobs=[
            None if entry.logprob is None else _top(entry.piece, entry.logprob, entry.top)
            for entry in entries
        ],
        text_offset=offsets,
    )


def _top(chosen: bytes, logprob: float, top: Sequence[tuple[bytes, float]]) -> dict[str, float]:
    """The likeliest, and the chosen one too; of tokens that are written alike the likeliest stays."""
    found: dict[str, float] = {}
    for piece, value in [*top, (chosen, logprob)]:
        found.setdefault(generation.text(piece), value)
    return found


class _Chunks(generation.Chunks[schema.Completion]):
    """The legacy stream's wording: every event is a whole completion object with a piece of text."""

    def __init__(self, request: schema.CompletionRequest, ready: wire.Ready, n: int) -> None:
        blank = schema.Completion(
            id=generation.new_id("cmpl"),
            created=generation.now(),
            model=request.model,
            system_fingerprint=generation.fingerprint(ready),
            choices=[],
        )
        super().__init__(blank, request.stream_options, n)
        self._with_logprobs = request.logprobs is not None
        self._offsets: dict[int, int] = {}

    def first(self, index: int) -> None:
        return None

    def delta(self, index: int, event: wire.Delta) -> bytes:
        logprobs = None
        if self._with_logprobs:
            offset = self._offsets.get(index, 0)
            logprobs = _logprobs(event.logprobs, offset)
            self._offsets[index] = offset + sum(len(token) for token in logprobs.tokens)
        return self._worded([schema.CompletionChoice(index=index, text=event.text, logprobs=logprobs)])

    def last(self, index: int, done: wire.Done) -> bytes:
        choice = schema.CompletionChoice(index=index, text="", finish_reason=done.finish_reason)
        return self._worded([choice], timings=generation.timings([done]))
