"""POST /v1/chat/completions: messages in, one or more answers out.

Owns what a chat request means and how its answers are worded. It must not know tokens, nor how
events are merged and sent.
"""

from collections.abc import Sequence
from functools import partial

from tinyoai import wire
from tinyoai.api import generation, schema
from tinyoai.models.pool import Lease, Pool
from tinyoai.text import template
from tinyoai.web.exchange import Exchange


class Chat:
    """The endpoint."""

    def __init__(self, pool: Pool, chat_template: str) -> None:
        self._pool = pool
        self._template = chat_template

    async def __call__(self, exchange: Exchange) -> None:
        """Answers one request. Raises errors.ApiError for all that can be refused."""
        request = schema.chat_request(await exchange.read_body())
        async with self._pool.lease(request.model, schema.keep_alive(request.keep_alive)) as lease:
            schema.settle(request, lease.model, lease.defaults)
            await self._answer(exchange, request, lease)

    async def _answer(self, exchange: Exchange, request: schema.ChatRequest, lease: Lease) -> None:
        ready, n = lease.ready, request.n or 1
        makes = self._makes(exchange, request, lease, n)
        if request.stream:
            await generation.stream(exchange, lease, makes, _Chunks(request, ready))
            return
        folded = await generation.fold(exchange, generation.events(lease, makes), n)
        dones = [choice.done for choice in folded if choice.done]
        body = schema.ChatCompletion(
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
                for index, choice in enumerate(folded)
            ],
            usage=generation.usage(dones, n),
            timings=generation.timings(dones),
        )
        exchange.respond(200, generation.encode(body))

    def _makes(
        self, exchange: Exchange, request: schema.ChatRequest, lease: Lease, n: int
    ) -> list[generation.Make]:
        rendered = lease.render(self._template, turns(request.messages))
        base = generation.sampling(request)
        standing = generation.standing(exchange, streamed=bool(request.stream))
        limits = [limit for limit in (request.max_completion_tokens, request.max_tokens) if limit is not None]

        def make(index: int, call_id: int) -> wire.Generate:
            return wire.Generate(
                id=call_id,
                prompt=rendered.segments,
                sampling=generation.seeded(base, index),
                max_tokens=min(limits, default=None),
                min_tokens=request.min_tokens or 0,
                stop=[*schema.stops(request), *rendered.stop],
                ignore_eos=bool(request.ignore_eos),
                exact=generation.repeatable(request),
                logprobs=(request.top_logprobs or 0) if request.logprobs else -1,
                strip_space=True,
                param="messages",
                **standing,
            )

        return [partial(make, index) for index in range(n)]


def turns(messages: Sequence[schema.ChatMessage]) -> list[template.Message]:
    """The conversation. Raises errors.BadRequest for a part that is no text."""
    return [
        template.Message(role=message.role, content=schema.content(message, index))
        for index, message in enumerate(messages)
    ]


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


class _Chunks(generation.Chunks[schema.ChatChunk]):
    """A chat stream's wording. A chunk of text is joined from ready-made bytes around it."""

    def __init__(self, request: schema.ChatRequest, ready: wire.Ready) -> None:
        blank = schema.ChatChunk(
            id=generation.new_id("chatcmpl"),
            created=generation.now(),
            model=request.model,
            system_fingerprint=generation.fingerprint(ready),
            choices=[],
        )
        super().__init__(blank, request.stream_options, request.n or 1)
        self._logprobs = bool(request.logprobs)
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def first(self, index: int) -> bytes:
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        whole = self._one(index, schema.ChoiceDelta(content=mark))
        before, _, after = whole.rpartition(generation.encode(mark))
        self._around[index] = (before, after)
        return self._one(index, schema.ChoiceDelta(role="assistant", content=""))

    def delta(self, index: int, event: wire.Delta) -> bytes:
        if self._logprobs:
            return self._one(
                index, schema.ChoiceDelta(content=event.text), logprobs=_logprobs(event.logprobs)
            )
        before, after = self._around[index]
        return before + generation.encode(event.text) + after

    def last(self, index: int, done: wire.Done) -> bytes:
        choice = schema.ChunkChoice(index=index, delta=schema.ChoiceDelta(), finish_reason=done.finish_reason)
        return self._worded([choice], timings=generation.timings([done]))

    def _one(
        self, index: int, delta: schema.ChoiceDelta, logprobs: schema.ChatLogprobs | None = None
    ) -> bytes:
        return self._worded([schema.ChunkChoice(index=index, delta=delta, logprobs=logprobs)])
