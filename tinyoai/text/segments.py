"""Segments to token ids.

Structure alone makes control tokens: a Special by its id, Markup by the control tokens in it, Ids after a range
check. A Text goes through the tokenizer and never becomes a control token.
"""

import re
from collections.abc import Sequence
from typing import Protocol

from tinyoai.wire import Ids, Markup, ModelInfo, Segment, Special, Text


class Vocabulary(Protocol):
    """A model's facts and its plain-text tokenizer."""

    info: ModelInfo

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text, never control tokens. Raises ValueError for text that it cannot take."""


def encode(segments: Sequence[Segment], vocabulary: Vocabulary) -> list[int]:
    """The ids of a prompt. Raises ValueError, in words for the client, for what cannot be encoded."""
    info, ids = vocabulary.info, list[int]()
    for segment in segments:
        if isinstance(segment, Text):
            if segment.text:
                ids += vocabulary.tokenize(segment.text)
        elif isinstance(segment, Ids):
            for token in segment.ids:
                if not 0 <= token < info.n_vocab:
                    raise ValueError(
                        f"token {token} is not in this model's vocabulary (0 to {info.n_vocab - 1})"
                    )
            ids += segment.ids
        elif isinstance(segment, Markup):
            ids += encode(split_markup(segment.text, info), vocabulary)
        else:
            token = _special(segment, info)
            if token >= 0:
                ids.append(token)
    return ids


def split_markup(text: str, info: ModelInfo) -> list[Segment]:
    """Template output as Special and Text segments: the longest control token text wins at each place."""
    names = sorted((name for name in info.special if name), key=len, reverse=True)
    if not names:
        return [Text(text)]
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    return [Special(part) if i % 2 else Text(part) for i, part in enumerate(parts) if part]


def n_text_bytes(segments: Sequence[Segment]) -> int:
    """UTF-8 bytes of all text in a prompt."""
    texts = (s.text for s in segments if isinstance(s, Text | Markup))
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def min_tokens(n_bytes: int, longest_piece: int) -> int:
    """The fewest tokens that `n_bytes` of text can have, known before it is tokenized."""
    return n_bytes // max(1, longest_piece)


def _special(segment: Special, info: ModelInfo) -> int:
    if segment.name == "bos":
        return info.bos_id if info.add_bos else -1
    if segment.name == "eos":
        return info.eos_id
    if segment.name not in info.special:
        raise ValueError(f"this model has no control token {segment.name!r}; choose another --chat-template")
    return info.special[segment.name]
