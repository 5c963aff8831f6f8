"""POST /v1/completions: the legacy endpoint, a prompt in and its continuation out."""

from collections.abc import Sequence

from tinyoai import sampling, wire
from tinyoai.api import generation, schema
from tinyoai.models.lease import Lease
from tinyoai.models.pool import Pool
from tinyoai.web.exchange import Exchange

DEFAULT_MAX_TOKENS = 256


class Completions:
    """The endpoint."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __call__(self, exchange: Exchange) -> None:
        """Answers one request. Raises errors.ApiError for all that can be refused."""
        request = schema.completion_request(await exchange.read_body())
        best_of = request.best_of or request.n or 1
        prompts = schema.prompts(request)
        if len(prompts) * best_of > schema.MAX_PROMPTS:
            raise schema.too_many(len(prompts), best_of)
        async with self._pool.lease(request.model, schema.keep_alive(request.keep_alive)) as lease:
            schema.apply_defaults(request, lease.name, lease.defaults)
            bodies = [_body(request, prompt, best_of, i) for i, prompt in enumerate(prompts)]
            if request.stream:
                await generation.stream(exchange, lease, bodies, best_of, _Chunks(request))
            else:
                await self._answer(exchange, request, lease, bodies, best_of)

    async def _answer(
        self,
        exchange: Exchange,
        request: schema.CompletionRequest,
        lease: Lease,
        bodies: Sequence[wire.Body],
        best_of: int,
    ) -> None:
        queue = generation.queue_fields(exchange, streamed=False)
        ready = await lease.ready(queue.get("deadline"))
        events = generation.in_order(lease.run(bodies, **queue), best_of)
        folded, totals = await generation.fold(exchange, events, len(bodies), best_of)
        n = request.n or 1
        chosen = [
            choice
            for at in range(0, len(folded), best_of)
            for choice in sorted(folded[at : at + best_of], key=_likelihood, reverse=best_of > n)[:n]
        ]
        answer = schema.Completion(
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
            usage=generation.usage(totals, best_of),
            timings=generation.timings(totals),
        )
        exchange.respond(200, generation.encode(answer))


def _body(
    request: schema.CompletionRequest, prompt: str | list[int], best_of: int, index: int
) -> wire.Generate:
    logprobs = -1 if request.logprobs is None else request.logprobs
    if best_of > (request.n or 1):
        logprobs = max(0, logprobs)
    segments: list[wire.Segment] = (
        [wire.Special("bos"), wire.Text(prompt)] if isinstance(prompt, str) else [wire.Ids(prompt)]
    )
    return wire.Generate(
        prompt=segments,
        sampling=sampling.resolve(
            request, seed=generation.seed(request), logit_bias=schema.logit_bias(request)
        ),
        n=best_of,
        max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
        min_tokens=request.min_tokens or 0,
        stop=schema.stops(request),
        ignore_eos=bool(request.ignore_eos),
        exact=generation.repeatable(request),
        logprobs=logprobs,
        score_end=True,
        echo=bool(request.echo),
        param="prompt",
    )


def _likelihood(choice: generation.Choice) -> float:
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


class _Chunks(generation.StreamFormat[schema.Completion]):
    """The legacy stream's wording: every event is a whole completion object with a piece of text."""

    def __init__(self, request: schema.CompletionRequest) -> None:
        blank = schema.Completion(
            id=generation.new_id("cmpl"),
            created=generation.now(),
            model=request.model,
            system_fingerprint="",
            choices=[],
        )
        super().__init__(blank, request.stream_options)
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
        return self._encode_chunk([schema.CompletionChoice(index=index, text=event.text, logprobs=logprobs)])

    def last(self, index: int, done: wire.ChoiceDone, times: schema.Timings) -> bytes:
        choice = schema.CompletionChoice(index=index, text="", finish_reason=done.finish_reason)
        return self._encode_chunk([choice], timings=times)
