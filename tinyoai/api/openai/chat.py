"""POST /v1/chat/completions: messages in, one or more answers out."""

from collections.abc import Sequence

from tinyoai import sampling, wire
from tinyoai.api import generation, schema
from tinyoai.models.lease import Lease
from tinyoai.models.pool import Pool
from tinyoai.web.exchange import Exchange


class Chat:
    """The endpoint."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __call__(self, exchange: Exchange) -> None:
        """Answers one request. Raises errors.ApiError for all that can be refused."""
        request = schema.chat_request(await exchange.read_body())
        conversation = schema.conversation(request.messages)
        async with self._pool.lease(request.model, schema.keep_alive(request.keep_alive)) as lease:
            schema.apply_defaults(request, lease.name, lease.defaults)
            body = _body(request, conversation)
            if request.stream:
                chunks = _Chunks(request)
                await generation.stream(exchange, lease, [body], body.n, chunks)
            else:
                await self._answer(exchange, request, lease, body)

    async def _answer(
        self, exchange: Exchange, request: schema.ChatRequest, lease: Lease, body: wire.Generate
    ) -> None:
        queue = generation.queue_fields(exchange, streamed=False)
        ready = await lease.ready(queue.get("deadline"))
        events = generation.in_order(lease.run([body], **queue), body.n)
        choices, totals = await generation.fold(exchange, events, 1, body.n)
        answer = schema.ChatCompletion(
            id=generation.new_id("chatcmpl"),
            created=generation.now(),
            model=request.model,
            system_fingerprint=generation.fingerprint(ready),
            choices=[
                schema.ChatChoice(
                    index=index,
                    message=schema.AnswerMessage(content=choice.text),
                    logprobs=_logprobs(choice.logprobs) if request.logprobs else None,
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(choices)
            ],
            usage=generation.usage(totals, body.n),
            timings=generation.timings(totals),
        )
        exchange.respond(200, generation.encode(answer))


def _body(request: schema.ChatRequest, conversation: wire.Conversation) -> wire.Generate:
    limits = [limit for limit in (request.max_completion_tokens, request.max_tokens) if limit is not None]
    return wire.Generate(
        prompt=conversation,
        sampling=sampling.resolve(
            request, seed=generation.seed(request), logit_bias=schema.logit_bias(request)
        ),
        n=request.n or 1,
        max_tokens=min(limits, default=None),
        min_tokens=request.min_tokens or 0,
        stop=schema.stops(request),
        ignore_eos=bool(request.ignore_eos),
        exact=generation.repeatable(request),
        logprobs=(request.top_logprobs or 0) if request.logprobs else -1,
        param="messages",
    )


def _logprobs(entries: Sequence[wire.TokenLogprob]) -> schema.ChatLogprobs:
    return schema.ChatLogprobs(
        content=[
            schema.TokenLogprob(
                token=generation.text(entry.piece),
                logprob=entry.logprob or 0.0,
                bytes=list(entry.piece),
                top_logprobs=[
                    schema.TopLogprob(token=generation.text(piece), logprob=logprob, bytes=list(piece))
                    for piece, logprob in entry.top
                ],
            )
            for entry in entries
        ]
    )


class _Chunks(generation.StreamFormat[schema.ChatChunk]):
    """A chat stream's wording. A chunk of text is joined from ready-made bytes around it."""

    def __init__(self, request: schema.ChatRequest) -> None:
        blank = schema.ChatChunk(
            id=generation.new_id("chatcmpl"),
            created=generation.now(),
            model=request.model,
            system_fingerprint="",
            choices=[],
        )
        super().__init__(blank, request.stream_options)
        self._logprobs = bool(request.logprobs)
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def first(self, index: int) -> bytes:
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        whole = self._one(index, schema.ChoiceDelta(content=mark))
        before, _, after = whole.rpartition(generation.encode(mark))
        self._around[index] = (before, after)
        return self._one(index, schema.ChoiceDelta(role="assistant", content=""))

    def content(self, index: int, event: wire.Content) -> bytes:
        if self._logprobs:
            return self._one(
                index, schema.ChoiceDelta(content=event.text), logprobs=_logprobs(event.logprobs)
            )
        before, after = self._around[index]
        return before + generation.encode(event.text) + after

    def last(self, index: int, done: wire.ChoiceDone, times: schema.Timings) -> bytes:
        choice = schema.ChunkChoice(index=index, delta=schema.ChoiceDelta(), finish_reason=done.finish_reason)
        return self._encode_chunk([choice], timings=times)

    def _one(
        self, index: int, delta: schema.ChoiceDelta, logprobs: schema.ChatLogprobs | None = None
    ) -> bytes:
        return self._encode_chunk([schema.ChunkChoice(index=index, delta=delta, logprobs=logprobs)])
