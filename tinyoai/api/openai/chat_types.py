"""Request and answer types of POST /v1/chat/completions, and those that /v1/completions shares with it."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from tinyoai.api.decode import Count, KeepAlive, Model, Natural
from tinyoai.models.adapter_files import MAX_ADAPTERS
from tinyoai.sampling import Bias, RepeatPenalty, SamplingOverrides, Seed
from tinyoai.wire import MAX_ADAPTER_SCALE

MAX_MESSAGES = 2048

LoraName = Annotated[str, Meta(min_length=1, max_length=100)]
LoraScale = Annotated[float, Meta(ge=-MAX_ADAPTER_SCALE, le=MAX_ADAPTER_SCALE)]
Choices = Annotated[int, Meta(ge=1, le=16)]
Role = Annotated[
    Literal["system", "developer", "user", "assistant", "tool"],
    Meta(description="The author; `developer` means `system`."),
]
NO_EFFECT = Meta(description="Accepted, without effect.")


# -- requests ----------------------------------------------------------------------------------------


class StreamOptions(Struct, kw_only=True):
    """Options of a stream."""

    include_usage: Annotated[
        bool | None, Meta(description="Send the token counts in one more chunk, which has no choices.")
    ] = None
    include_obfuscation: Annotated[bool | None, NO_EFFECT] = None


class LoraUse(Struct, kw_only=True):
    """A LoRA adapter of a request, by its name or its id."""

    name: Annotated[LoraName | None, Meta(description="Its name in `GET /lora-adapters`.")] = None
    id: Annotated[Count | None, Meta(description="Its id there, in place of the name.")] = None
    scale: Annotated[
        LoraScale | None, Meta(description="The factor of its changes; without it 1, and 0 turns it off.")
    ] = None


Lora = Annotated[
    list[LoraName | LoraUse],
    Meta(
        max_length=MAX_ADAPTERS,
        description="The LoRA adapters for this answer and no others: names, or objects with a `name` or an `id` and "
        "a `scale`. Without this field the model's own apply, with their scales; an empty list turns all off.",
    ),
]


class Generation(SamplingOverrides, frozen=True, kw_only=True):
    """Request fields of both completion endpoints."""

    model: Model
    stream: Annotated[bool | None, Meta(description="Send the answer as server-sent events.")] = None
    stream_options: Annotated[StreamOptions | None, Meta(description="Options of a stream.")] = None
    max_tokens: Annotated[
        Count | None,
        Meta(
            description="The most tokens to generate. The default is the model's own, else for chats no limit and "
            "for completions 256."
        ),
    ] = None
    min_tokens: Annotated[
        Count | None, Meta(description="The fewest tokens to generate before the model may end its answer.")
    ] = None
    ignore_eos: Annotated[
        bool | None,
        Meta(description="Generate up to `max_tokens` or the end of the context, whatever the model does."),
    ] = None
    n: Annotated[Choices | None, Meta(description="The number of answers to the same prompt.")] = None
    seed: Annotated[Seed | None, Meta(description="Equal seeds and requests give equal answers.")] = None
    stop: Annotated[
        str | list[str] | None, Meta(description="Texts that end the answer. They are not part of it.")
    ] = None
    repetition_penalty: Annotated[
        RepeatPenalty | None, Meta(description="vLLM's name for `repeat_penalty`.")
    ] = None
    logit_bias: Annotated[
        dict[str, Bias] | None,
        Meta(description="Numbers to add to logits, by token id; -100 forbids a token."),
    ] = None
    lora: Lora | None = None
    keep_alive: KeepAlive | None = None
    user: Annotated[str | None, NO_EFFECT] = None


class ContentPart(Struct, kw_only=True):
    """A part of a message's content."""

    type: Annotated[str, Meta(description="`text`; other types are refused.")]
    text: Annotated[str | None, Meta(description="The text.")] = None


class ChatMessage(Struct, kw_only=True):
    """One message of a conversation."""

    role: Role
    content: Annotated[
        str | list[ContentPart] | None, Meta(description="A text, or parts of type `text`.")
    ] = None
    name: Annotated[str | None, NO_EFFECT] = None
    tool_calls: Annotated[list[dict[str, Any]] | None, NO_EFFECT] = None
    tool_call_id: Annotated[str | None, NO_EFFECT] = None


TemplateArguments = Annotated[
    dict[str, Any] | None,
    Meta(
        description="Further variables for the model's own Jinja template, such as `enable_thinking`. Named chat "
        "formats ignore them."
    ),
]
Messages = Annotated[
    list[ChatMessage],
    Meta(min_length=1, max_length=MAX_MESSAGES, description="The conversation, oldest message first."),
]


class ResponseFormat(Struct, kw_only=True):
    """The format of an answer."""

    type: Annotated[str, Meta(description="Only `text` is supported.")]


class ChatRequest(Generation, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[
        Natural | None,
        Meta(description="The newer name of `max_tokens`; if both are given, the smaller one counts."),
    ] = None
    logprobs: Annotated[
        bool | None, Meta(description="Return the log-probability of each token of the answer.")
    ] = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None,
        Meta(description="The number of alternatives to return for each token; needs `logprobs`."),
    ] = None
    tools: Annotated[
        list[Any] | None, Meta(description="Refused unless empty: this server does not call tools.")
    ] = None
    tool_choice: Annotated[Any, NO_EFFECT] = None
    functions: Annotated[
        list[Any] | None, Meta(description="Refused unless empty: this server does not call tools.")
    ] = None
    chat_template_kwargs: TemplateArguments = None
    response_format: Annotated[ResponseFormat | None, Meta(description="Only `text` is supported.")] = None
    modalities: Annotated[list[str] | None, Meta(description="Only `text` is supported.")] = None


# -- answers -----------------------------------------------------------------------------------------


class PromptTokensDetails(Struct, kw_only=True):
    """Details of the prompt's tokens."""

    cached_tokens: int
    audio_tokens: int = 0


class Usage(Struct, kw_only=True):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Timings(Struct, kw_only=True):
    """Times in milliseconds and speeds. The counts are of tokens evaluated, without cached ones."""

    cache_n: int
    cache_miss: int
    """The prompt token at which the nearest prompt in the cache differs; -1: no cached one begins with its first."""
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    queue_ms: float | msgspec.UnsetType = msgspec.UNSET
    """The wait for a slot, in a stream that began before it had one."""


class TopLogprob(Struct, kw_only=True):
    """An alternative to a token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct, kw_only=True):
    """A token of the answer, and the likeliest tokens in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, kw_only=True):
    """Log-probabilities of a chat answer."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(Struct, kw_only=True):
    """The model's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Struct, kw_only=True):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(Struct, kw_only=True):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class ChoiceDelta(Struct, kw_only=True, omit_defaults=True):
    """The part of a choice that a chunk adds."""

    role: str | None = None
    content: str | None = None


class ChunkChoice(Struct, kw_only=True):
    """One choice in a chunk."""

    index: int
    delta: ChoiceDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(Struct, kw_only=True):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    timings: Timings | msgspec.UnsetType = msgspec.UNSET
