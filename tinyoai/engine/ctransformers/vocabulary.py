"""Token ids to bytes, and plain text without control tokens."""

from collections.abc import Mapping

MAX_BPE_TEXT = 2000
"""Characters given at once to a byte-pair tokenizer: its regular expressions recurse and overflow the stack."""

END_TEXTS = (
    "</s>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|end_of_text|>",
)
"""Control tokens that end generation wherever a vocabulary has them."""


class Vocabulary:
    """The tokens of a model. `pieces` are their bytes by id; control tokens have none."""

    def __init__(
        self, pieces: list[bytes], special: Mapping[str, int], byte_tokens: Mapping[int, int]
    ) -> None:
        self.pieces = pieces
        self.longest_piece = max((len(piece) for piece in pieces), default=1)
        self._texts = {token: text.encode() for text, token in special.items()}
        self._bytes = byte_tokens

    def piece(self, token: int, special: bool) -> bytes:
        """The bytes of a token; for control tokens none, or with `special` their text."""
        if special and token in self._texts:
            return self._texts[token]
        return self.pieces[token]

    def plain(self, ids: list[int]) -> list[int]:
        """The ids with every control token spelled in bytes: plain text must not contain one."""
        if self._texts.keys().isdisjoint(ids):
            return ids
        out: list[int] = []
        for token in ids:
            if token in self._texts:
                out += [self._bytes[byte] for byte in self._texts[token] if byte in self._bytes]
            else:
                out.append(token)
        return out


def split_text(text: str) -> list[str]:
    """Splits text into parts short enough for a byte-pair tokenizer, before spaces where possible."""
    parts = []
    while len(text) > MAX_BPE_TEXT:
        cut = text.rfind(" ", 1, MAX_BPE_TEXT)
        cut = cut if cut > 0 else MAX_BPE_TEXT
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]
