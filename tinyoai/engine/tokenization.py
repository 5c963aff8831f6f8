"""Tokenize and Detokenize: a prompt to ids and back, control tokens written by their texts.

Needs no slot and is safe beside a running step.
"""

import sys
from collections.abc import Sequence

from tinyoai import wire
from tinyoai.engine.contract import Engine
from tinyoai.engine.rendering import ChatRenderer
from tinyoai.text.segments import n_text_bytes

MAX_BYTES = 1 << 20
"""The longest text of a Tokenize: about a second on a small device."""
MAX_IDS = 1 << 20

Result = wire.Tokens | wire.PlainText | wire.Failed


def answer(request: wire.Request, engine: Engine, renderer: ChatRenderer) -> Result:
    """The result of a Tokenize or Detokenize, or its Failed."""
    body = request.body
    try:
        if isinstance(body, wire.Tokenize):
            return _tokenize(request.id, body, engine, renderer)
        if isinstance(body, wire.Detokenize):
            return _detokenize(request.id, body, engine)
        raise TypeError(f"{type(body).__name__} needs a slot")
    except ValueError as error:
        param = body.param
        return wire.Failed(id=request.id, kind="BadRequest", message=str(error), param=param)
    except Exception as error:  # one request's fault must not end the thread that serves all
        print(f"request {request.id}: {type(error).__name__}: {error}", file=sys.stderr)
        return wire.Failed(id=request.id, kind="InternalError", message="the text could not be read")


def _tokenize(request_id: int, body: wire.Tokenize, engine: Engine, renderer: ChatRenderer) -> wire.Tokens:
    segments = renderer.render(body.prompt).segments
    size = n_text_bytes(segments)
    if size > MAX_BYTES:
        raise ValueError(f"the text has {size} bytes; the limit is {MAX_BYTES}")
    ids = engine.encode(segments)
    return wire.Tokens(
        id=request_id,
        ids=ids,
        pieces=[engine.piece(token, special=True) for token in ids] if body.pieces else [],
        text=_written(segments, engine) if body.text else "",
    )


def _detokenize(request_id: int, body: wire.Detokenize, engine: Engine) -> wire.PlainText:
    """The text of ids. The space that the tokenizer put before a text is not a part of it."""
    if len(body.ids) > MAX_IDS:
        raise ValueError(f"there are {len(body.ids)} tokens; the limit is {MAX_IDS}")
    ids = engine.encode([wire.Ids(body.ids)])
    return wire.PlainText(id=request_id, text=_text(ids, engine))


def _text(ids: Sequence[int], engine: Engine) -> str:
    control = set(engine.info.special.values())
    parts: list[bytes] = []
    # each text between control tokens was tokenized by itself and has a space of its own
    begins = engine.info.add_space_prefix
    for token in ids:
        piece = engine.piece(token, special=True)
        if token in control:
            begins = engine.info.add_space_prefix
        else:
            piece = piece[1:] if begins and piece.startswith(b" ") else piece
            begins = False
        parts.append(piece)
    return b"".join(parts).decode("utf-8", "replace")


def _written(segments: Sequence[wire.Segment], engine: Engine) -> str:
    """The prompt as text: exactly its input, with control tokens by their texts."""
    parts: list[str] = []
    for segment in segments:
        if isinstance(segment, wire.Text | wire.Markup):
            parts.append(segment.text)
        elif isinstance(segment, wire.Ids):
            parts.append(_text(segment.ids, engine))
        else:
            parts.append(_text(engine.encode([segment]), engine))
    return "".join(parts)
