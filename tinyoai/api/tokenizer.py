"""POST /tokenize, /detokenize, /apply-template, GET /tokenizer_info: a model's vocabulary and template at work.

Owns what these requests mean and how their answers are worded: llama.cpp's server has given the fields
their names, and vLLM `count` and `max_model_len`. It must not know a vocabulary.
"""

from contextlib import aclosing

from tinyoai import errors, wire
from tinyoai.api import generation, schema
from tinyoai.api.openai.chat import turns
from tinyoai.models.pool import Lease, Pool
from tinyoai.models.worker import Make
from tinyoai.web.exchange import Exchange


class Tokens:
    """The endpoints."""

    def __init__(self, pool: Pool, chat_template: str) -> None:
        self._pool = pool
        self._template = chat_template

    async def tokenize(self, exchange: Exchange) -> None:
        """A text's tokens. Control tokens are never made of text, only put before it by `add_special`."""
        request = schema.tokenize_request(await exchange.read_body())
        prompt: list[wire.Segment] = [wire.Text(request.content or "")]
        if request.add_special or request.add_special_tokens:
            prompt = [wire.Special("bos"), *prompt]
        with_pieces = bool(request.with_pieces)
        async with self._pool.lease(self._name(request.model)) as lease:
            tokens = await _tokens(
                lease, lambda call_id: wire.Tokenize(id=call_id, prompt=prompt, pieces=with_pieces)
            )
            pieces = zip(tokens.ids, tokens.pieces, strict=True) if with_pieces else ()
            told: list[int | schema.TokenPiece] = [
                schema.TokenPiece(id=token, piece=_piece(piece)) for token, piece in pieces
            ]
            body = schema.Tokenized(
                tokens=told if with_pieces else [*tokens.ids],
                count=len(tokens.ids),
                max_model_len=lease.ready.n_ctx,
            )
        exchange.respond(200, generation.encode(body))

    async def detokenize(self, exchange: Exchange) -> None:
        """The text of tokens. Raises errors.BadRequest for ids that are not in the vocabulary."""
        request = schema.detokenize_request(await exchange.read_body())
        async with self._pool.lease(self._name(request.model)) as lease:
            said = await _only(lease, lambda call_id: wire.Detokenize(id=call_id, ids=request.tokens))
        if not isinstance(said, wire.Plain):
            raise errors.InternalError("the model's process gave no text")
        exchange.respond(200, generation.encode(schema.Detokenized(content=said.text, prompt=said.text)))

    async def info(self, exchange: Exchange) -> None:
        """What the default model's vocabulary is."""
        async with self._pool.lease(self._name(None)) as lease:
            ready = lease.ready
        body = schema.TokenizerInfo(
            bos_token=ready.bos or None,
            eos_token=ready.eos or None,
            vocab_size=ready.n_vocab,
            model_max_length=ready.n_ctx,
            chat_template=ready.chat_template or None,
        )
        exchange.respond(200, generation.encode(body))

    async def apply_template(self, exchange: Exchange) -> None:
        """The prompt that a chat request with these messages has, and its length in tokens."""
        request = schema.template_request(await exchange.read_body())
        messages = turns(request.messages)
        async with self._pool.lease(self._name(request.model)) as lease:
            ready, segments = lease.ready, lease.render(self._template, messages).segments
            tokens = await _tokens(
                lease,
                lambda call_id: wire.Tokenize(id=call_id, prompt=segments, text=True, param="messages"),
            )
        body = schema.AppliedTemplate(prompt=tokens.text, count=len(tokens.ids), max_model_len=ready.n_ctx)
        exchange.respond(200, generation.encode(body))

    def _name(self, given: str | None) -> str:
        """The model asked for, or the one given at start."""
        return self._pool.default.model.name if given is None else given


async def _only(lease: Lease, make: Make) -> wire.Good:
    """The one event of an answer that has one. Raises errors.ApiError."""
    async with aclosing(lease.call(make)) as source:
        async for event in source:
            return generation.good(event)
    raise errors.InternalError("the model's process did not answer")


async def _tokens(lease: Lease, make: Make) -> wire.Tokens:
    said = await _only(lease, make)
    if not isinstance(said, wire.Tokens):
        raise errors.InternalError("the model's process gave no tokens")
    return said


def _piece(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
