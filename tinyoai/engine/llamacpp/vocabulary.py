"""The tokenizer of a llama.cpp model: segments to ids, and ids to bytes.

libllama ends the process over an id outside of the vocabulary, so each id is checked here. Text never becomes a
control token: libllama still recognises user-defined tokens in plain text, and with some tokenizers control tokens
too, so those that mark something are found afterwards and spelled out. Safe beside a running evaluation.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from tinyoai.engine.llamacpp import hooks
from tinyoai.engine.llamacpp.library import Library
from tinyoai.text import segments
from tinyoai.wire import Ids, Markup, ModelInfo, Segment, Special, Text

SPM, BPE, WPM = 1, 2, 3
"""Values of llama_vocab_type: SentencePiece, byte pairs, WordPiece."""
MAX_RUN = 8192
"""Characters without a break that a byte-pair tokenizer gets at once: its regular expressions recurse over them."""

_RUN = re.compile(rf"\S{{{MAX_RUN}}}|\s{{{MAX_RUN}}}")
_MARKER = re.compile(
    r"<[|\uff5c].*|.*[|\uff5c]>|\[/?[A-Z_]+\]|</?(think|tool_\w+|(start|end)_of_\w+)>", re.DOTALL
)
"""Texts of user-defined tokens that mark something in a prompt, whatever the chat template says."""


class Vocabulary:
    """The vocabulary of a loaded model. `vocab` is a `llama_vocab *`."""

    def __init__(self, library: Library, vocab: Any) -> None:
        self._ffi, self._lib, self._vocab = library.ffi, library.lib, vocab
        self.n_vocab = int(self._lib.llama_vocab_n_tokens(vocab))
        self.type = int(self._lib.llama_vocab_type(vocab))
        kinds = hooks.scan_vocabulary(
            int(self._ffi.cast("uintptr_t", vocab)),
            self.n_vocab,
            library.address("llama_vocab_is_eog"),
            library.address("llama_vocab_get_attr"),
            library.address("llama_token_to_piece"),
        )
        self._flags = kinds.flags
        self.longest_piece = kinds.longest_piece
        self.eog_ids = tuple(kinds.having(hooks.EOG))
        self._pieces: dict[int, bytes] = {}
        self._bytes = {self.piece(token): token for token in kinds.having(hooks.BYTE)}
        self.special = {self._text(token): token for token in kinds.having(hooks.CONTROL)}
        """Control tokens, and after `mark` user-defined ones that mark something, by their text."""
        self._user = kinds.having(hooks.USER)
        self._markers = {token: text for text, token in self.special.items() if text}
        """The texts of control tokens, and of user-defined ones that mark something."""
        self.info: ModelInfo
        """Set once the model's facts are known."""

    def mark(self, chat_template: str) -> None:
        """Adds the user-defined tokens that the chat template writes, or that look like markers, to `special`."""
        for token in self._user:
            text = self._text(token)
            plain = not text.strip() or text.strip().isalnum()
            if not plain and (_MARKER.fullmatch(text) or text in chat_template):
                self._markers[token] = text
                self.special[text] = token

    # -- ids to bytes ------------------------------------------------------------------------------

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token; for control tokens none, or with `special` their text."""
        if not special and (known := self._pieces.get(token)) is not None:
            return known
        piece = self._piece(token, special)
        if not special:
            self._pieces[token] = piece
        return piece

    def _piece(self, token: int, special: bool) -> bytes:
        if not 0 <= token < self.n_vocab:
            raise ValueError(f"token {token} is not in this model's vocabulary (0 to {self.n_vocab - 1})")
        size = 64
        while True:
            buffer = self._ffi.new("char[]", size)
            n = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return bytes(self._ffi.buffer(buffer, n))
            size = -n

    def _text(self, token: int) -> str:
        return self._piece(token, True).decode("utf-8", "replace")

    # -- segments to ids ---------------------------------------------------------------------------

    def encode(self, prompt: Sequence[Segment]) -> list[int]:
        """Ids of a prompt. No Text can become a control token. Raises ValueError in words for the client."""
        ids: list[int] = []
        strip = False
        for i, segment in enumerate(prompt):
            if isinstance(segment, Text | Markup):
                text = segment.text
                if strip:
                    text = text.lstrip()
                if i + 1 < len(prompt) and self._has(prompt[i + 1], hooks.LSTRIP):
                    text = text.rstrip()
                if text:
                    ids += self._markup(text) if isinstance(segment, Markup) else self.tokenize(text)
                strip = strip and not text
            elif isinstance(segment, Special | Ids):
                ids += segments.encode([segment], self)
                strip = self._has(segment, hooks.RSTRIP)
        return ids

    def _has(self, segment: Segment, bit: int) -> bool:
        """Whether a segment is a control token of a kind."""
        token = self.special.get(segment.name, -1) if isinstance(segment, Special) else -1
        return token >= 0 and bool(self._flags[token] & bit)

    def _markup(self, text: str) -> list[int]:
        return self._call(_to_bytes(text), parse_special=True)

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text, never control tokens. Raises ValueError for half of a surrogate pair."""
        ids: list[int] = []
        for part in _parts(text) if self.type == BPE else (text,):
            ids += self._call(_to_bytes(part), parse_special=False)
        if not self._markers or self._markers.keys().isdisjoint(ids):
            return ids
        plain: list[int] = []
        for token in ids:
            marker = self._markers.get(token)
            # a token for unknown words may be a control token, and stands for other texts
            plain += [token] if marker is None or marker not in text else self._spelled(marker)
        return plain

    def _spelled(self, marker: str) -> list[int]:
        """A marker as plain text: its bytes where the vocabulary has them, else its characters."""
        raw = marker.encode()
        if all(raw[i : i + 1] in self._bytes for i in range(len(raw))):
            return [self._bytes[raw[i : i + 1]] for i in range(len(raw))]
        return [token for char in marker for token in self._call(char.encode(), parse_special=False)]

    def _call(self, raw: bytes, *, parse_special: bool) -> list[int]:
        size = len(raw) + 16
        while True:
            ids = self._ffi.new("llama_token[]", size)
            n = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, size, False, parse_special)
            if n >= 0:
                return list(self._ffi.unpack(ids, n)) if n else []
            size = -n


def _to_bytes(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text contains half of a surrogate pair; send whole characters") from None


def _parts(text: str) -> Iterator[str]:
    """The text, cut after each run of MAX_RUN characters that has no break."""
    at = 0
    if len(text) >= MAX_RUN:
        for run in _RUN.finditer(text):
            yield text[at : run.end()]
            at = run.end()
    if at < len(text) or not text:
        yield text[at:]
