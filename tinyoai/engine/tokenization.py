"""What a model's vocabulary makes of text, and back: the answers to Tokenize and Detokenize.

Owns those two answers, control tokens written out by their texts in them. It knows an engine only by its
protocol, needs no slot, and must not know who asks. Safe to call beside a running step.
"""

from collections.abc import Sequence

from tinyoai import wire
from tinyoai.engine.contract import Engine
from tinyoai.text.segments import encode

MAX_BYTES = 1 << 20
"""Longest text that is tokenized for its own sake: what a small device does in about a second."""
MAX_IDS = 1 << 20


def tokenize(request: wire.Tokenize, engine: Engine) -> wire.Tokens | wire.Failed:
    """The prompt's ids; if they are wanted, each one's bytes and the prompt written out."""
    texts = [segment.text for segment in request.prompt if isinstance(segment, wire.Text)]
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    if size > MAX_BYTES:
        return _refuse(request, f"the text has {size} bytes; at most {MAX_BYTES} are tokenized at once")
    try:
        ids = encode(request.prompt, engine)
    except ValueError as error:
        return _refuse(request, str(error))
    names = _names(engine)
    return wire.Tokens(
        id=request.id,
        ids=ids,
        pieces=[names.get(token) or engine.piece(token) for token in ids] if request.pieces else [],
        text=_written(request.prompt, engine, names) if request.text else "",
    )


def detokenize(request: wire.Detokenize, engine: Engine) -> wire.Plain | wire.Failed:
    """The ids' text. The space that the tokenizer put before a text is not a part of it."""
    if len(request.ids) > MAX_IDS:
        return _refuse(request, f"there are {len(request.ids)} tokens; at most {MAX_IDS} are read at once")
    try:
        ids = encode([wire.Ids(request.ids)], engine)
    except ValueError as error:
        return _refuse(request, str(error))
    return wire.Plain(id=request.id, text=_text(ids, engine, _names(engine)))


def _text(ids: Sequence[int], engine: Engine, names: dict[int, bytes]) -> str:
    parts: list[bytes] = []
    begins = engine.info.first_piece_space
    """Every text between control tokens was tokenized by itself, and got a space of its own."""
    for token in ids:
        name = names.get(token)
        if name is not None:
            parts.append(name)
            begins = engine.info.first_piece_space
            continue
        piece = engine.piece(token)
        parts.append(piece[1:] if begins and piece.startswith(b" ") else piece)
        begins = False
    return b"".join(parts).decode("utf-8", "replace")


def _written(prompt: Sequence[wire.Segment], engine: Engine, names: dict[int, bytes]) -> str:
    """The prompt as text: exactly what was put in, with control tokens by their texts."""
    parts: list[str] = []
    for segment in prompt:
        if isinstance(segment, wire.Text):
            parts.append(segment.text)
        elif isinstance(segment, wire.Ids):
            parts.append(_text(segment.ids, engine, names))
        else:
            parts += [names.get(token, b"").decode("utf-8", "replace") for token in encode([segment], engine)]
    return "".join(parts)


def _names(engine: Engine) -> dict[int, bytes]:
    """Control tokens' texts by id."""
    return {token: text.encode() for text, token in engine.info.special.items()}


def _refuse(request: wire.Tokenize | wire.Detokenize, message: str) -> wire.Failed:
    return wire.Failed(id=request.id, kind="BadRequest", message=message, param=request.param)
