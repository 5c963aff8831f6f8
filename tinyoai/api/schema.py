"""The shapes of requests and answers: every bound and enum lives in a type here.

Owns decoding and its error messages. `null` for an optional field means absent; unknown fields are
ignored, known ones are checked. It must not know models, workers or sockets.
"""

import re
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta, Struct

from tinyoai import errors
from tinyoai.config import options
from tinyoai.models.registry import Defaults, Kind

MAX_MESSAGES = 2048
MAX_PROMPTS = 128
MAX_INPUTS = 2048
MAX_STOPS = 60
MAX_STOP_BYTES = 1024
MAX_LOGIT_BIAS = 1024

Temperature = Annotated[float, Meta(ge=0, le=2)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepeatPenalty = Annotated[float, Meta(gt=0, le=10)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Natural = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Choices = Annotated[int, Meta(ge=1, le=16)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Role = Literal["system", "developer", "user", "assistant", "tool"]
Encoding = Literal["float", "base64"]
Acted = Literal["loaded", "already_loaded", "unloaded", "unloading", "not_loaded"]
"""unloading: it is in use, and goes with its last running answer."""
KeepAlive = float | Annotated[str, Meta(min_length=1, max_length=32)]
"""Seconds, or a time such as "5m"; below 0: for ever."""
ModelName = Annotated[str, Meta(min_length=1, max_length=512)]


# -- requests --------------------------------------------------------------------------------------


class StreamOptions(Struct, kw_only=True):
    """What a stream carries besides its text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ContentPart(Struct, kw_only=True):
    """A part of a message's content; only text can be read here."""

    type: str
    text: str | None = None


class ChatMessage(Struct, kw_only=True):
    """One message of a conversation."""

    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ResponseFormat(Struct, kw_only=True):
    """The form of the answer; only plain text so far."""

    type: str


class Generation(Struct, kw_only=True):
    """The fields that both completion endpoints share."""

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: TopK | None = None
    min_p: Fraction | None = None
    n: Choices | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repeat_penalty: RepeatPenalty | None = None
    logit_bias: dict[str, Bias] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    keep_alive: KeepAlive | None = None
    user: str | None = None


class ChatRequest(Generation, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Natural | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None


class ModelRequest(Struct, kw_only=True):
    """The body of POST /v1/models/unload: a model by `name`, or by `model`."""

    name: ModelName | None = None
    model: ModelName | None = None


class LoadRequest(ModelRequest, kw_only=True):
    """The body of POST /v1/models/load."""

    keep_alive: KeepAlive | None = None


class CompletionRequest(Generation, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    best_of: Choices | None = None


class EmbeddingRequest(Struct, kw_only=True):
    """The body of POST /v1/embeddings."""

    model: ModelName
    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: Encoding | None = None
    dimensions: Natural | None = None
    keep_alive: KeepAlive | None = None
    user: str | None = None


class TokenizeRequest(Struct, kw_only=True):
    """The body of POST /tokenize: the text under one of three names. Without `model`: the default one."""

    content: str | None = None
    text: str | None = None
    prompt: str | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    """vLLM's name for the same."""
    with_pieces: bool | None = None
    model: ModelName | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """The body of POST /detokenize."""

    tokens: list[TokenId]
    model: ModelName | None = None


class TemplateRequest(Struct, kw_only=True):
    """The body of POST /apply-template."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: ModelName | None = None


T = TypeVar("T")

_PATH = re.compile(r"^(?P<what>.*) - at `(?P<path>[^`]*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`$")
_BOUND = re.compile(r"^Expected `(?P<type>\w+)`(?P<length> of length)? (?P<sign>[<>]=?) (?P<bound>\S+)$")
_SIGNS = {">=": "at least", ">": "more than", "<=": "at most", "<": "less than"}
_UNITS = {"array": " items", "str": " characters"}
_ENUMS = {"role": get_args(Role), "encoding_format": get_args(Encoding)}
"""What msgspec does not say: the values that a field of a request can have."""
_chat = msgspec.json.Decoder(ChatRequest)
_completion = msgspec.json.Decoder(CompletionRequest)
_load = msgspec.json.Decoder(LoadRequest)
_unload = msgspec.json.Decoder(ModelRequest)
_embedding = msgspec.json.Decoder(EmbeddingRequest)
_tokenize = msgspec.json.Decoder(TokenizeRequest)
_detokenize = msgspec.json.Decoder(DetokenizeRequest)
_template = msgspec.json.Decoder(TemplateRequest)


def _decode(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    if not body.strip():
        raise errors.InvalidJson("the request has no body; send a JSON object")
    try:
        body.decode()  # msgspec skips unknown fields unread, and would let broken text through there
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise errors.InvalidJson(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise errors.InvalidJson("the body is nested too deeply") from None


def _explain(message: str) -> errors.BadRequest:
    """msgspec tells where only in its message: `... - at `$.messages[0].role``."""
    found = _PATH.match(message)
    what, path = (found["what"], found["path"]) if found else (message, "$")
    param = path.removeprefix("$").removeprefix(".").replace("[...]", "")
    missing = _MISSING.match(what)
    if missing:
        param = f"{param}.{missing['field']}" if param else missing["field"]
        return errors.BadRequest(f"the field {param!r} is required", param=param)
    if not param:
        return errors.BadRequest(f"the body must be a JSON object: {_lower(what)}")
    field = param.rpartition(".")[2]
    if field in _ENUMS and what.startswith("Invalid enum value"):
        what += f"; it is one of {', '.join(_ENUMS[field])}"
    if bound := _BOUND.match(what):
        return errors.BadRequest(f"{param}: {_limit(bound)}", param=param)
    return errors.BadRequest(f"{param}: {_lower(what)}", param=param)


def _limit(bound: re.Match[str]) -> str:
    """What a value must be, of msgspec's "Expected `float` <= 2.0"."""
    if not bound["length"]:
        return f"must be {_SIGNS[bound['sign']]} {bound['bound']}"
    if bound["sign"] + bound["bound"] == ">=1":
        return "must not be empty"
    return f"must be {_SIGNS[bound['sign']]} {bound['bound']}{_UNITS.get(bound['type'], '')} long"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def chat_request(body: bytes) -> ChatRequest:
    """The typed request. Raises errors.BadRequest with the field's name in `param`."""
    request = _decode(_chat, body)
    _check(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise errors.BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if request.max_tokens == 0:
        raise errors.BadRequest("max_tokens: must be at least 1", param="max_tokens")
    for field in ("tools", "functions"):
        if getattr(request, field):
            raise errors.BadRequest(f"{field}: this server does not call tools; leave it out", param=field)
    if request.response_format is not None and request.response_format.type != "text":
        raise errors.BadRequest(
            "response_format: only the type 'text' is supported; leave it out", param="response_format"
        )
    if request.modalities is not None and request.modalities != ["text"]:
        raise errors.BadRequest("modalities: only ['text'] is supported", param="modalities")
    return request


def completion_request(body: bytes) -> CompletionRequest:
    """The typed request. Raises errors.BadRequest with the field's name in `param`."""
    request = _decode(_completion, body)
    _check(request)
    if request.suffix:
        raise errors.BadRequest(
            "suffix: this model has no infill tokens, so it cannot fill a gap; leave it out", param="suffix"
        )
    if request.best_of is not None:
        if request.best_of < (request.n or 1):
            raise errors.BadRequest("best_of must be at least n", param="best_of")
        if request.stream and request.best_of > (request.n or 1):
            raise errors.BadRequest(
                "best_of cannot be streamed: the best answer is known only at the end", param="best_of"
            )
    return request


def embedding_request(body: bytes) -> EmbeddingRequest:
    """The typed request. Raises errors.BadRequest with the field's name in `param`."""
    return _decode(_embedding, body)


def tokenize_request(body: bytes) -> TokenizeRequest:
    """The typed request, its text in `content`. Raises errors.BadRequest with the field's name in `param`."""
    request = _decode(_tokenize, body)
    given = [name for name in ("content", "text", "prompt") if getattr(request, name) is not None]
    if not given:
        raise errors.BadRequest("the field 'content' is required", param="content")
    if len(given) > 1:
        raise errors.BadRequest(f"{given[1]}: there is a text in {given[0]} already", param=given[1])
    request.content = getattr(request, given[0])
    _no_nul(given[0], request.content or "")
    return request


def detokenize_request(body: bytes) -> DetokenizeRequest:
    """The typed request. Raises errors.BadRequest with the field's name in `param`."""
    return _decode(_detokenize, body)


def template_request(body: bytes) -> TemplateRequest:
    """The typed request. Raises errors.BadRequest with the field's name in `param`."""
    request = _decode(_template, body)
    for i, message in enumerate(request.messages):
        for text in _content_texts(message):
            _no_nul(f"messages[{i}].content", text)
    return request


def _no_nul(field: str, text: str) -> None:
    if "\0" in text:
        raise errors.BadRequest(f"{field}: the text holds a NUL character; take it out", param=field)


def load_request(body: bytes) -> LoadRequest:
    """The typed request. Raises errors.BadRequest with the field's name in `param`."""
    return _decode(_load, body)


def unload_request(body: bytes) -> ModelRequest:
    """The typed request. Raises errors.BadRequest with the field's name in `param`."""
    return _decode(_unload, body)


def model_name(request: ModelRequest) -> str:
    """The model that is meant. Raises errors.BadRequest if none is, or two are."""
    name = request.name or request.model
    if name is None:
        raise errors.BadRequest("the field 'name' is required", param="name")
    if request.name and request.model and request.name != request.model:
        raise errors.BadRequest("name and model say different things; send one of them", param="model")
    return name


def keep_alive(given: float | str | None) -> float | None:
    """Seconds, -1 for ever, None for unsaid. Raises errors.BadRequest."""
    if given is None:
        return None
    try:
        seconds = options.seconds(given) if isinstance(given, str) else given
    except ValueError as error:
        raise errors.BadRequest(f"keep_alive: {given!r}: {error}", param="keep_alive") from None
    return -1.0 if seconds < 0 else min(seconds, options.MAX_SECONDS)


def settle(request: Generation, model: str, defaults: Defaults) -> None:
    """Puts the id that is served, and the model's own defaults, where the request left them open."""
    request.model = model
    for field in defaults.__struct_fields__:
        value = getattr(defaults, field)
        if value is not None and getattr(request, field) is None:
            if field == "max_tokens" and getattr(request, "max_completion_tokens", None) is not None:
                continue  # the same thing by its newer name
            setattr(request, field, value)


def _check(request: Generation) -> None:
    for field, text in _texts(request):
        _no_nul(field, text)
    for stop in stops(request):
        if not stop:
            raise errors.BadRequest("stop: an empty string would stop every answer at once", param="stop")
        if len(stop.encode()) > MAX_STOP_BYTES:
            raise errors.BadRequest(f"stop: a sequence is over {MAX_STOP_BYTES} bytes long", param="stop")
    if len(stops(request)) > MAX_STOPS:
        raise errors.BadRequest(f"stop: at most {MAX_STOPS} sequences are possible", param="stop")
    if len(request.logit_bias or {}) > MAX_LOGIT_BIAS:
        raise errors.BadRequest(f"logit_bias: at most {MAX_LOGIT_BIAS} tokens", param="logit_bias")


def _texts(request: Generation) -> list[tuple[str, str]]:
    if isinstance(request, ChatRequest):
        return [
            (f"messages[{i}].content", text)
            for i, message in enumerate(request.messages)
            for text in _content_texts(message)
        ]
    if isinstance(request, CompletionRequest):
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        return [("prompt", prompt) for prompt in prompts if isinstance(prompt, str)]
    return []


def _content_texts(message: ChatMessage) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text or "" for part in message.content or ()]


def stops(request: Generation) -> list[str]:
    """The stop sequences as a list."""
    if request.stop is None:
        return []
    return [request.stop] if isinstance(request.stop, str) else request.stop


def logit_bias(request: Generation) -> dict[int, float]:
    """Token id to bias. Raises errors.BadRequest for a key that is no token id."""
    found = {}
    for key, bias in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 9):
            raise errors.BadRequest(f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
        found[int(key)] = bias
    return found


def content(message: ChatMessage, index: int) -> str:
    """A message's text, its parts joined. Raises errors.BadRequest for what is not text."""
    if message.content is None:
        if message.role == "assistant":
            return ""
        field = f"messages[{index}].content"
        raise errors.BadRequest(f"{field}: a {message.role} message needs a content", param=field)
    if isinstance(message.content, str):
        return message.content
    texts = []
    for i, part in enumerate(message.content):
        field = f"messages[{index}].content[{i}]"
        if part.type not in ("text", "refusal"):
            raise errors.BadRequest(
                f"{field}: this model reads text only, not {part.type[:40]!r}; send parts of type 'text'",
                param=field,
            )
        if part.text is None:
            raise errors.BadRequest(f"{field}: a text part needs a 'text'", param=field)
        texts.append(part.text)
    return "".join(texts)


def prompts(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts in order: each a text or token ids. Raises errors.BadRequest for a mixture."""
    return _texts_or_ids(request.prompt, "prompt", MAX_PROMPTS)


def inputs(request: EmbeddingRequest) -> list[tuple[str, str | list[int]]]:
    """What to embed, in order, each with the name of its field. Raises errors.BadRequest."""
    found = _texts_or_ids(request.input, "input", MAX_INPUTS)
    single = isinstance(request.input, str) or isinstance(request.input[0], int)
    named = [("input" if single else f"input[{i}]", item) for i, item in enumerate(found)]
    for field, item in named:
        if not item:
            raise errors.BadRequest(f"{field}: it is empty; send a text", param=field)
        if isinstance(item, str):
            _no_nul(field, item)
    return named


def _texts_or_ids(given: str | list[str | int | list[int]], field: str, most: int) -> list[str | list[int]]:
    """One text, several, one list of token ids, or several: always as several."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise errors.BadRequest(f"{field}: the list is empty", param=field)
    if all(isinstance(item, int) for item in given):
        return [[item for item in given if isinstance(item, int)]]
    if len(given) > most:
        raise errors.BadRequest(f"{field}: at most {most} {field}s in one request", param=field)
    if all(isinstance(item, str) for item in given):
        return [item for item in given if isinstance(item, str)]
    if all(isinstance(item, list) for item in given):
        return [item for item in given if isinstance(item, list)]
    raise errors.BadRequest(f"{field}: texts, token ids and lists of token ids cannot be mixed", param=field)


def too_many(n_prompts: int, per_prompt: int) -> errors.BadRequest:
    """The refusal of a request for more answers than one request may have."""
    return errors.BadRequest(
        f"{n_prompts} prompts with {per_prompt} answers each are over the {MAX_PROMPTS} that one request "
        "may ask for; send several requests",
        param="prompt",
    )


# -- answers ---------------------------------------------------------------------------------------


class PromptTokensDetails(Struct, kw_only=True):
    """How the prompt was come by."""

    cached_tokens: int
    audio_tokens: int = 0


class Usage(Struct, kw_only=True):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Timings(Struct, kw_only=True):
    """How long it took. `_n` counts tokens evaluated, cached ones not among them."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class TopLogprob(Struct, kw_only=True):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct, kw_only=True):
    """A token of the answer, and the likeliest in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, kw_only=True):
    """Log-probabilities of a chat answer."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(Struct, kw_only=True):
    """Log-probabilities in the legacy form: parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AnswerMessage(Struct, kw_only=True):
    """What the model said."""

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
    """What a chunk adds to a choice."""

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


class CompletionChoice(Struct, kw_only=True):
    """One of the answers of the legacy endpoint, whole or a piece of it."""

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


class Embedding(Struct, kw_only=True):
    """One input's vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | bytes


class EmbeddingUsage(Struct, kw_only=True):
    """Token counts of a request that generates nothing."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, kw_only=True):
    """The answer of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class TokenPiece(Struct, kw_only=True):
    """A token and its text; its bytes where these are no text by themselves."""

    id: int
    piece: str | list[int]


class Tokenized(Struct, kw_only=True):
    """The answer of POST /tokenize."""

    tokens: list[int | TokenPiece]
    count: int
    max_model_len: int


class Detokenized(Struct, kw_only=True):
    """The answer of POST /detokenize."""

    content: str
    prompt: str
    """The same, under vLLM's name."""


class TokenizerInfo(Struct, kw_only=True):
    """The answer of GET /tokenizer_info: what evaluation programs ask before they tokenize. null: it has none."""

    tokenizer_class: str = "tinyoai"
    bos_token: str | None
    eos_token: str | None
    vocab_size: int
    model_max_length: int
    chat_template: str | None


class AppliedTemplate(Struct, kw_only=True):
    """The answer of POST /apply-template: what a chat request with these messages puts before the model."""

    prompt: str
    count: int
    max_model_len: int


class Model(Struct, kw_only=True):
    """A model's card: OpenAI's four fields, and what its file says. Lengths are in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tinyoai"
    model_id: int | None
    """Its number in the registry."""
    type: Kind
    state: str
    architecture: str
    quantization: str
    parameters: int
    context_length: int
    """The window that it is served with."""
    max_context_length: int
    """The window that it was trained for; 0: its file does not say."""
    dimensions: int | None
    """Numbers in its embeddings; 0: it cannot embed; null until it is loaded."""
    pooling: str | None
    """How token states become an embedding: mean, weighted-mean or last; null if it cannot, or is not known yet."""
    size_bytes: int
    template: str
    aliases: list[str]
    defaults: Defaults
    """What its requests mean where they leave a field out."""


class ModelMemory(Struct, kw_only=True):
    """`estimated_bytes` is what it takes with all its slots full, and what it is planned with."""

    estimated_bytes: int
    resident_bytes: int


class Slots(Struct, kw_only=True):
    """How many requests it answers at a time."""

    total: int
    busy: int
    free: int


class ModelStatus(Struct, kw_only=True):
    """How one model is. Times are in seconds; `last_used` is Unix time."""

    id: str
    model_id: int | None
    type: Kind
    state: str
    """loading, ready, waiting (for a restart), failed, unloaded, missing (its file is gone) or broken."""
    reason: str
    """Why it is in this state, where that needs a reason."""
    uptime: float | None = None
    pid: int | None = None
    """Of the worker process."""
    memory: ModelMemory | None = None
    slots: Slots | None = None
    queue: int = 0
    in_use: int = 0
    """Requests that hold it now."""
    answers: int = 0
    tokens_per_second: float | None = None
    """The decode speed of one stream, over its last answers."""
    last_used: int | None = None
    keep_alive: float | None = None
    """How long it stays loaded without a request; -1: for ever."""
    unloads_in: float | None = None


class MemoryStatus(Struct, kw_only=True):
    """The memory that all models share: their budget, what the loaded ones reserve of it, what the machine has."""

    budget_bytes: int
    reserved_bytes: int
    available_bytes: int | None


class RegistryStatus(Struct, kw_only=True):
    """`problem` says why models are not registered beyond this run; empty when they are."""

    problem: str


class ModelsStatus(Struct, kw_only=True):
    """The answer of GET /v1/models/status."""

    object: Literal["list"] = "list"
    data: list[ModelStatus]
    memory: MemoryStatus
    registry: RegistryStatus


class ModelAction(Struct, kw_only=True):
    """The answer of POST /v1/models/load and /unload; `seconds` is how long it took."""

    status: Acted
    name: str
    model: str
    seconds: float


class ModelDeleted(Struct, kw_only=True):
    """The answer of DELETE /v1/models/{id}."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class ModelList(Struct, kw_only=True):
    """The answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Alive(Struct, kw_only=True):
    """The answer of GET /health/live."""

    status: Literal["ok"] = "ok"


class ModelHealth(Struct, kw_only=True):
    """How one model is; `reason` says why it is not ready."""

    id: str
    state: str
    reason: str


Ready = Literal["ok", "loading", "failed", "draining"]


class Health(Struct, kw_only=True):
    """The answer of GET /health and /health/ready."""

    status: Ready
    models: list[ModelHealth]
