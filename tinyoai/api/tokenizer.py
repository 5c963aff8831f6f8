"""POST /tokenize, /detokenize, /apply-template and GET /tokenizer_info.

The field names are llama.cpp's; `count` and `max_model_len` are vLLM's.
"""

from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, TypeVar

from msgspec import Meta, Struct

from tinyoai import errors, wire
from tinyoai.api import decode, generation
from tinyoai.api.decode import ModelName, TokenId
from tinyoai.api.openai.chat import conversation
from tinyoai.api.openai.chat_types import Messages, TemplateArguments
from tinyoai.models.pool import Pool
from tinyoai.web.exchange import Exchange

if TYPE_CHECKING:
    from tinyoai.models.pool import Lease

OptionalModel = Annotated[
    ModelName | None, Meta(description="An id from `GET /v1/models`; without it, the server's default model.")
]
_TEXT = Meta(description="The text, in one of the three fields `content`, `text` and `prompt`.")

T = TypeVar("T", wire.Tokens, wire.PlainText)


class TokenizeRequest(Struct, kw_only=True):
    """The body of POST /tokenize."""

    content: Annotated[str | None, _TEXT] = None
    text: Annotated[str | None, _TEXT] = None
    prompt: Annotated[str | None, _TEXT] = None
    add_special: Annotated[
        bool | None,
        Meta(description="Begin with the token that begins a prompt (BOS), if the model has one."),
    ] = None
    add_special_tokens: Annotated[bool | None, Meta(description="vLLM's name for `add_special`.")] = None
    with_pieces: Annotated[
        bool | None,
        Meta(description="Return the text of each token too, or its bytes where they are not valid UTF-8."),
    ] = None
    model: OptionalModel = None


class DetokenizeRequest(Struct, kw_only=True):
    """The body of POST /detokenize."""

    tokens: Annotated[list[TokenId], Meta(description="Token ids. An id outside the vocabulary is refused.")]
    model: OptionalModel = None


class TemplateRequest(Struct, kw_only=True):
    """The body of POST /apply-template."""

    messages: Messages
    chat_template_kwargs: TemplateArguments = None
    model: OptionalModel = None


class TokenPiece(Struct, kw_only=True):
    """A token with its text, or with its bytes where they are not valid UTF-8."""

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
    """The same text, under vLLM's name."""


class TokenizerInfo(Struct, kw_only=True):
    """The answer of GET /tokenizer_info. null: the model has no such token or template."""

    tokenizer_class: str = "tinyoai"
    bos_token: str | None
    eos_token: str | None
    vocab_size: int
    model_max_length: int
    chat_template: str | None


class AppliedTemplate(Struct, kw_only=True):
    """The answer of POST /apply-template: the prompt of a chat request with these messages."""

    prompt: str
    count: int
    max_model_len: int


class Tokenizer:
    """The endpoints."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def tokenize(self, exchange: Exchange) -> None:
        """Turns a text into tokens. Raises errors.ApiError."""
        request = decode.decode(TokenizeRequest, await exchange.read_body())
        prompt: list[wire.Segment] = [wire.Text(content(request))]
        if request.add_special or request.add_special_tokens:
            prompt = [wire.Special("bos"), *prompt]
        with_pieces = bool(request.with_pieces)
        async with self._pool.lease(self._name(request.model)) as lease:
            ready = await lease.ready(generation.deadline(exchange))
            tokens = await _only(lease, wire.Tokenize(prompt=prompt, pieces=with_pieces), wire.Tokens)
        listed: list[int | TokenPiece] = [*tokens.ids]
        if with_pieces:
            pairs = zip(tokens.ids, tokens.pieces, strict=True)
            listed = [TokenPiece(id=token, piece=_piece(piece)) for token, piece in pairs]
        body = Tokenized(tokens=listed, count=len(tokens.ids), max_model_len=ready.info.n_ctx)
        exchange.respond(200, decode.encode(body))

    async def detokenize(self, exchange: Exchange) -> None:
        """Turns tokens into a text. Raises errors.ApiError."""
        request = decode.decode(DetokenizeRequest, await exchange.read_body())
        async with self._pool.lease(self._name(request.model)) as lease:
            await lease.ready(generation.deadline(exchange))
            found = await _only(lease, wire.Detokenize(ids=request.tokens), wire.PlainText)
        exchange.respond(200, decode.encode(Detokenized(content=found.text, prompt=found.text)))

    async def info(self, exchange: Exchange) -> None:
        """Describes the default model's vocabulary. Raises errors.ApiError."""
        async with self._pool.lease(self._name(None)) as lease:
            info = (await lease.ready(generation.deadline(exchange))).info
        body = TokenizerInfo(
            bos_token=info.token_text(info.bos_id) or None,
            eos_token=info.token_text(info.eos_id) or None,
            vocab_size=info.n_vocab,
            model_max_length=info.n_ctx,
            chat_template=info.chat_template or None,
        )
        exchange.respond(200, decode.encode(body))

    async def apply_template(self, exchange: Exchange) -> None:
        """Returns the prompt of a conversation and its length in tokens. Raises errors.ApiError."""
        request = decode.decode(TemplateRequest, await exchange.read_body())
        prompt = conversation(request.messages, request.chat_template_kwargs)
        body = wire.Tokenize(prompt=prompt, text=True, param="messages")
        async with self._pool.lease(self._name(request.model)) as lease:
            ready = await lease.ready(generation.deadline(exchange))
            tokens = await _only(lease, body, wire.Tokens)
        answer = AppliedTemplate(prompt=tokens.text, count=len(tokens.ids), max_model_len=ready.info.n_ctx)
        exchange.respond(200, decode.encode(answer))

    def _name(self, given: str | None) -> str:
        return self._pool.default.name if given is None else given


def content(request: TokenizeRequest) -> str:
    """Returns the text to tokenize. Raises errors.BadRequest unless exactly one field has it."""
    given = [name for name in ("content", "text", "prompt") if getattr(request, name) is not None]
    if not given:
        raise errors.BadRequest("the field 'content' is required", param="content")
    if len(given) > 1:
        raise errors.BadRequest(
            f"{given[1]}: {given[0]} already has a text; send one of them", param=given[1]
        )
    text: str = getattr(request, given[0])
    decode.reject_nul(given[0], text)
    return text


async def _only(lease: "Lease", body: wire.Body, kind: type[T]) -> T:
    """Returns the one result of a body. Raises errors.ApiError."""
    found: T | None = None
    async with aclosing(lease.run([body])) as events:
        async for _, event in events:
            if isinstance(event, wire.Failed):
                raise generation.failure(event)
            if isinstance(event, kind):
                found = event
    if found is None:
        raise errors.InternalError("the model's process returned no result")
    return found


def _piece(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
