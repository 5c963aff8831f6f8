"""POST /tokenize, /detokenize, /apply-template and GET /tokenizer_info.

llama.cpp's server named the fields; `count` and `max_model_len` are vLLM's.
"""

from contextlib import aclosing

from tinyoai import errors, wire
from tinyoai.api import generation, schema
from tinyoai.models.lease import Lease
from tinyoai.models.pool import Pool
from tinyoai.web.exchange import Exchange


class Tokens:
    """The endpoints."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def tokenize(self, exchange: Exchange) -> None:
        """The tokens of a text. Text never makes control tokens; `add_special` puts one before it."""
        request = schema.tokenize_request(await exchange.read_body())
        prompt: list[wire.Segment] = [wire.Text(request.content or "")]
        if request.add_special or request.add_special_tokens:
            prompt = [wire.Special("bos"), *prompt]
        with_pieces = bool(request.with_pieces)
        async with self._pool.lease(self._name(request.model)) as lease:
            ready = await lease.ready()
            tokens = await _tokens(lease, wire.Tokenize(prompt=prompt, pieces=with_pieces))
        pieces = zip(tokens.ids, tokens.pieces, strict=True) if with_pieces else ()
        listed: list[int | schema.TokenPiece] = [
            schema.TokenPiece(id=token, piece=_piece(piece)) for token, piece in pieces
        ]
        answer = schema.Tokenized(
            tokens=listed if with_pieces else [*tokens.ids],
            count=len(tokens.ids),
            max_model_len=ready.info.n_ctx,
        )
        exchange.respond(200, generation.encode(answer))

    async def detokenize(self, exchange: Exchange) -> None:
        """The text of tokens. Raises errors.BadRequest for ids that are not in the vocabulary."""
        request = schema.detokenize_request(await exchange.read_body())
        async with self._pool.lease(self._name(request.model)) as lease:
            await lease.ready()
            result = await _result(lease, wire.Detokenize(ids=request.tokens))
        if not isinstance(result, wire.PlainText):
            raise errors.InternalError("the model's process returned no text")
        answer = schema.Detokenized(content=result.text, prompt=result.text)
        exchange.respond(200, generation.encode(answer))

    async def info(self, exchange: Exchange) -> None:
        """Facts of the default model's vocabulary."""
        async with self._pool.lease(self._name(None)) as lease:
            info = (await lease.ready()).info
        answer = schema.TokenizerInfo(
            bos_token=info.token_text(info.bos_id) or None,
            eos_token=info.token_text(info.eos_id) or None,
            vocab_size=info.n_vocab,
            model_max_length=info.n_ctx,
            chat_template=info.chat_template or None,
        )
        exchange.respond(200, generation.encode(answer))

    async def apply_template(self, exchange: Exchange) -> None:
        """The prompt of a chat request with these messages, and its length in tokens."""
        request = schema.template_request(await exchange.read_body())
        conversation = schema.conversation(request.messages)
        async with self._pool.lease(self._name(request.model)) as lease:
            ready = await lease.ready()
            tokens = await _tokens(lease, wire.Tokenize(prompt=conversation, text=True, param="messages"))
        answer = schema.AppliedTemplate(
            prompt=tokens.text, count=len(tokens.ids), max_model_len=ready.info.n_ctx
        )
        exchange.respond(200, generation.encode(answer))

    def _name(self, given: str | None) -> str:
        """The model of a request, or the default one."""
        return self._pool.default.name if given is None else given


async def _result(lease: Lease, body: wire.Body) -> wire.Success:
    """The one result of a request that has one. Raises errors.ApiError."""
    found: wire.Success | None = None
    async with aclosing(lease.run([body])) as source:
        async for _, event in source:
            result = generation.raise_if_failed(event)
            if isinstance(result, wire.Tokens | wire.PlainText):
                found = result
    if found is None:
        raise errors.InternalError("the model's process did not answer")
    return found


async def _tokens(lease: Lease, body: wire.Tokenize) -> wire.Tokens:
    result = await _result(lease, body)
    if not isinstance(result, wire.Tokens):
        raise errors.InternalError("the model's process returned no tokens")
    return result


def _piece(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
