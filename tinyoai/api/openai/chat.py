"""POST /v1/chat/completions, and the parts that /v1/completions shares: requests to bodies, events to chunks."""

import secrets
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from msgspec import Struct, structs

from tinyoai import errors, wire
from tinyoai.api import decode, generation
from tinyoai.api.generation import Answer, Choice
from tinyoai.api.openai.chat_types import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChoiceDelta,
    ChunkChoice,
    Generation,
    LoraUse,
    PromptTokensDetails,
    Timings,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from tinyoai.models.pool import Pool
from tinyoai.sampling import SamplingOverrides
from tinyoai.text import template_args as template_arguments
from tinyoai.web.exchange import Exchange

Chunk = TypeVar("Chunk", bound=Struct)


class Chat:
    """The endpoint."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __call__(self, exchange: Exchange) -> None:
        """Answers one request. Raises errors.ApiError."""
        request = decode.decode(ChatRequest, await exchange.read_body())
        check(request)
        prompt = conversation(request.messages, request.chat_template_kwargs)
        async with self._pool.lease(request.model, decode.keep_alive(request.keep_alive)) as lease:
            limits = [
                limit for limit in (request.max_completion_tokens, request.max_tokens) if limit is not None
            ]
            body = generate(
                request,
                prompt,
                lease.defaults,
                max_tokens=min(limits, default=lease.defaults.max_tokens),
                logprobs=(request.top_logprobs or 0) if request.logprobs else -1,
                param="messages",
            )
            if request.stream:
                await generation.stream(
                    exchange, lease, [body], lambda answer: _ChatFormat(answer, lease.name, request)
                )
                return
            answer = await generation.fold(exchange, lease, [body])
            name = lease.name
        completion = ChatCompletion(
            id=generation.new_id("chatcmpl"),
            created=generation.now(),
            model=name,
            system_fingerprint=generation.fingerprint(answer.ready),
            choices=[
                ChatChoice(
                    index=index,
                    message=AnswerMessage(content=choice.text),
                    logprobs=_logprobs(choice.logprobs) if request.logprobs else None,
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(answer.choices)
            ],
            usage=usage(answer),
            timings=timings(answer, answer.choices),
        )
        exchange.respond(200, decode.encode(completion))


def check(request: ChatRequest) -> None:
    """Raises errors.BadRequest for fields that contradict each other or are not supported."""
    if request.top_logprobs is not None and not request.logprobs:
        raise errors.BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if request.max_tokens == 0:
        raise errors.BadRequest("max_tokens: must be at least 1", param="max_tokens")
    for field in ("tools", "functions"):
        if getattr(request, field):
            raise errors.BadRequest(f"{field}: this server does not call tools; remove it", param=field)
    if request.response_format is not None and request.response_format.type != "text":
        raise errors.BadRequest(
            "response_format: only the type 'text' is supported; remove it", param="response_format"
        )
    if request.modalities is not None and request.modalities != ["text"]:
        raise errors.BadRequest("modalities: only ['text'] is supported", param="modalities")


def conversation(messages: Sequence[ChatMessage], template_args: dict[str, Any] | None) -> wire.Conversation:
    """Returns the prompt of a chat. Raises errors.BadRequest for content that is not text, and for wrong arguments."""
    if template_args and (problem := template_arguments.problem(template_args)):
        raise errors.BadRequest(f"chat_template_kwargs: {problem}", param="chat_template_kwargs")
    return wire.Conversation(
        messages=[
            wire.Message(role=message.role, content=_content(message, index))
            for index, message in enumerate(messages)
        ],
        template_args=template_args or {},
    )


def _content(message: ChatMessage, index: int) -> str:
    field = f"messages[{index}].content"
    if message.content is None:
        if message.role == "assistant":
            return ""
        raise errors.BadRequest(f"{field}: a {message.role} message needs content", param=field)
    if isinstance(message.content, str):
        text = message.content
    else:
        texts = []
        for i, part in enumerate(message.content):
            if part.type not in ("text", "refusal"):
                raise errors.BadRequest(
                    f"{field}[{i}]: this model reads text only, not {part.type[:40]!r}; send parts of type 'text'",
                    param=f"{field}[{i}]",
                )
            if part.text is None:
                raise errors.BadRequest(f"{field}[{i}]: a text part needs 'text'", param=f"{field}[{i}]")
            texts.append(part.text)
        text = "".join(texts)
    decode.reject_nul(field, text)
    return text


def _logprobs(entries: Sequence[wire.TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=entry.piece.decode("utf-8", "replace"),
                logprob=entry.logprob or 0.0,
                bytes=list(entry.piece),
                top_logprobs=[
                    TopLogprob(token=piece.decode("utf-8", "replace"), logprob=logprob, bytes=list(piece))
                    for piece, logprob in entry.top
                ],
            )
            for entry in entries
        ]
    )


# -- shared by both completion endpoints ---------------------------------------------------------------


def generate(
    request: Generation,
    prompt: wire.Prompt,
    defaults: SamplingOverrides,
    *,
    n: int | None = None,
    **fields: Any,
) -> wire.Generate:
    """Returns the body for a prompt; `fields` are the endpoint's own. Raises errors.BadRequest."""
    other = request.repetition_penalty
    if other is not None and request.repeat_penalty not in (None, other):
        raise errors.BadRequest(
            "repetition_penalty and repeat_penalty differ; send one of them", param="repetition_penalty"
        )
    sampling = decode.sampling(
        request,
        SamplingOverrides(repeat_penalty=other),
        defaults,
        seed=secrets.randbits(63) if request.seed is None else request.seed & (2**64 - 1),
        logit_bias=decode.logit_bias(request.logit_bias),
    )
    return wire.Generate(
        prompt=prompt,
        sampling=sampling,
        n=n or request.n or 1,
        min_tokens=request.min_tokens or 0,
        stop=decode.stop_sequences(request.stop),
        ignore_eos=bool(request.ignore_eos),
        exact=request.seed is not None or sampling.temperature == 0,
        adapters=lora(request.lora),
        **fields,
    )


def lora(given: Sequence[str | LoraUse] | None) -> tuple[wire.Adapter, ...] | None:
    """Returns the LoRA adapters of a request; the worker knows which there are. Raises errors.BadRequest."""
    if given is None:
        return None
    found = []
    for index, use in enumerate(given):
        if isinstance(use, str):
            found.append(wire.Adapter(use))
            continue
        named = use.id if use.name is None else use.name
        if named is None or (use.name is not None and use.id is not None):
            raise errors.BadRequest(
                f"lora[{index}]: name the adapter by one of 'name' and 'id'", param=f"lora[{index}]"
            )
        found.append(wire.Adapter(named, 1.0 if use.scale is None else use.scale))
    return tuple(found)


def usage(answer: Answer) -> Usage:
    """Returns the token counts of a request."""
    n_prompt, n_generated = answer.n_prompt, answer.n_generated
    return Usage(
        prompt_tokens=n_prompt,
        completion_tokens=n_generated,
        total_tokens=n_prompt + n_generated,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=answer.n_cached),
    )


def timings(answer: Answer, choices: Sequence[Choice]) -> Timings:
    """Returns times and speeds, summed over these choices."""
    ends = [choice.end for choice in choices]
    n_cached = sum(end.n_cached for end in ends)
    n_prompt = sum(choice.prompt.n_prompt for choice in choices) - n_cached
    n_generated = sum(end.n_generated for end in ends)
    prompt_ms = sum(end.prompt_ms for end in ends)
    predicted_ms = sum(end.predicted_ms for end in ends)
    found = Timings(
        cache_n=n_cached,
        cache_miss=ends[0].cache_miss,
        prompt_n=n_prompt,
        prompt_ms=prompt_ms,
        prompt_per_token_ms=prompt_ms / max(1, n_prompt),
        prompt_per_second=n_prompt / prompt_ms * 1000.0 if prompt_ms > 0 else 0.0,
        predicted_n=n_generated,
        predicted_ms=predicted_ms,
        predicted_per_token_ms=predicted_ms / max(1, n_generated),
        predicted_per_second=n_generated / predicted_ms * 1000.0 if predicted_ms > 0 else 0.0,
    )
    if answer.waited:
        found.queue_ms = round(max(choice.prompt.queue_ms for choice in choices), 3)
    return found


class Format(generation.StreamFormat, Generic[Chunk]):
    """OpenAI's stream. `blank` is a chunk with everything that all chunks have, and no choices."""

    def __init__(self, answer: Answer, blank: Chunk, request: Generation) -> None:
        super().__init__(answer)
        options = request.stream_options
        self._with_usage = bool(options and options.include_usage)
        self._blank: Chunk = structs.replace(blank, usage=None) if self._with_usage else blank

    def end(self) -> list[bytes]:
        if not self._with_usage:
            return [b"[DONE]"]
        answer = self.answer
        return [
            self._chunk([], usage=usage(answer), timings=timings(answer, answer.choices)),
            b"[DONE]",
        ]

    def _chunk(self, choices: list[Any], **more: Any) -> bytes:
        return decode.encode(structs.replace(self._blank, choices=choices, **more))


class _ChatFormat(Format[ChatChunk]):
    """A chat stream. A chunk of text is joined from ready-made bytes around it, which is faster than encoding it."""

    def __init__(self, answer: Answer, model: str, request: ChatRequest) -> None:
        blank = ChatChunk(
            id=generation.new_id("chatcmpl"),
            created=generation.now(),
            model=model,
            system_fingerprint=generation.fingerprint(answer.ready),
            choices=[],
        )
        super().__init__(answer, blank, request)
        self._logprobs = bool(request.logprobs)
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def first(self, index: int) -> bytes:
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        whole = self._one(index, ChoiceDelta(content=mark))
        before, _, after = whole.rpartition(decode.encode(mark))
        self._around[index] = (before, after)
        return self._one(index, ChoiceDelta(role="assistant", content=""))

    def content(self, index: int, event: wire.Content) -> bytes:
        if self._logprobs:
            return self._one(index, ChoiceDelta(content=event.text), logprobs=_logprobs(event.logprobs))
        before, after = self._around[index]
        return before + decode.encode(event.text) + after

    def last(self, index: int) -> bytes:
        choice = self.answer.choices[index]
        end = ChunkChoice(index=index, delta=ChoiceDelta(), finish_reason=choice.finish_reason)
        return self._chunk([end], timings=timings(self.answer, [choice]))

    def _one(self, index: int, delta: ChoiceDelta, logprobs: ChatLogprobs | None = None) -> bytes:
        return self._chunk([ChunkChoice(index=index, delta=delta, logprobs=logprobs)])
