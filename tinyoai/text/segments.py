"""Segments to token ids.

Owns the rule that structure alone makes control tokens: a Special by its id in the vocabulary, a
Text only by the tokenizer, Ids only after a range check. It knows a vocabulary by protocol and must
not know which engine or model stands behind it.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from tinyoai.wire import Ids, Segment, Special, Text


class Info(Protocol):
    """What encoding needs to know of a model."""

    @property
    def n_vocab(self) -> int:
        """Entries in the vocabulary."""

    @property
    def bos_id(self) -> int:
        """The token that begins a prompt, or -1."""

    @property
    def eos_id(self) -> int:
        """The token that ends a text, or -1."""

    @property
    def special(self) -> Mapping[str, int]:
        """Control tokens by their text."""


class Vocabulary(Protocol):
    """What tokenizes."""

    @property
    def info(self) -> Info:
        """The model."""

    def tokenize(self, text: str) -> list[int]:
        """Plain text to ids, never control tokens; raises ValueError for text it cannot take."""


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
        else:
            token = _special(segment, info)
            if token >= 0:
                ids.append(token)
    return ids


def _special(segment: Special, info: Info) -> int:
    if segment.name == "bos":
        return info.bos_id
    if segment.name == "eos":
        return info.eos_id
    if segment.name not in info.special:
        raise ValueError(f"this model has no control token {segment.name!r}; choose another --chat-template")
    return info.special[segment.name]


def min_tokens(n_bytes: int, longest_piece: int) -> int:
    """The fewest tokens that `n_bytes` of text can be: what can be refused before it is tokenized."""
    return n_bytes // max(1, longest_piece)
