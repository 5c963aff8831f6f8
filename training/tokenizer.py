"""The vocabulary, and an encoder that equals the library's SentencePiece tokenizer.

The encoder puts a space before the text and writes spaces as U+2581. It merges the adjacent pair whose union has
the best score, the leftmost of equals, until no pair is a piece; characters that are no piece become byte tokens.
No piece contains a digit, a newline, or U+2581 after its start, so words can be encoded one by one and cached.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable

SPACE = "\u2581"
UNK, BOS, EOS = 0, 1, 2
IM_START, IM_END = 259, 260
_WORDS = re.compile(rf"\n|[0-9]|{SPACE}?[^\n0-9{SPACE}]+|{SPACE}")


def words(text: str) -> list[str]:
    """Returns the text with its leading space, split where no merge can cross."""
    return _WORDS.findall(SPACE + text.replace(" ", SPACE))


class Tokenizer:
    """A vocabulary: control and byte tokens, then pieces from best to worst."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self._ids = {piece: 261 + i for i, piece in enumerate(pieces)}
        self._cache: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return 261 + len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text segment; none for an empty text."""
        ids: list[int] = []
        for word in words(text) if text else ():
            found = self._cache.get(word)
            if found is None:
                found = self._word(word)
                if len(self._cache) < 200_000:
                    self._cache[word] = found
            ids += found
        return ids

    def _word(self, word: str) -> list[int]:
        parts = list(word)
        while True:
            best, at = len(self._ids) + 261, -1
            for i in range(len(parts) - 1):
                rank = self._ids.get(parts[i] + parts[i + 1], best)
                if rank < best:
                    best, at = rank, i
            if at < 0:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids: list[int] = []
        for part in parts:
            if part in self._ids:
                ids.append(self._ids[part])
            else:
                ids += [3 + byte for byte in part.encode()]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, without control tokens."""
        out = b""
        for token in ids:
            if token >= 261:
                out += self.pieces[token - 261].replace(SPACE, " ").encode()
            elif 3 <= token < 259:
                out += bytes([token - 3])
        return out.decode("utf-8", "replace")

    def table(self) -> tuple[list[bytes], list[float], list[int]]:
        """Returns tokens, scores and GGUF token types: 1 normal, 2 unknown, 3 control, 6 byte."""
        tokens = [
            b"<unk>",
            b"<s>",
            b"</s>",
            *(b"<0x%02X>" % i for i in range(256)),
            b"<|im_start|>",
            b"<|im_end|>",
        ]
        tokens += [piece.encode() for piece in self.pieces]
        scores = [0.0] * 261 + [-float(rank) for rank in range(len(self.pieces))]
        return tokens, scores, [2, 3, 3] + [6] * 256 + [3, 3] + [1] * len(self.pieces)


def train(texts: Iterable[str], n_vocab: int) -> Tokenizer:
    """Learns byte-pair merges by count. Single characters of the corpus are pieces too, ranked last."""
    counts = Counter(word for text in texts for word in words(text))
    splits = {word: list(word) for word in counts if word != "\n"}
    letters = {c for word in splits for c in word} | {chr(c) for c in range(33, 127)} | {SPACE}
    n_merges = n_vocab - 261 - len(letters)
    merges: list[str] = []
    for _ in range(n_merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in splits.items():
            n = counts[word]
            for pair in itertools.pairwise(parts):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merged = best[0] + best[1]
        merges.append(merged)
        for word, parts in splits.items():
            if merged in word:
                i = 0
                while i < len(parts) - 1:
                    if (parts[i], parts[i + 1]) == best:
                        parts[i : i + 2] = [merged]
                    i += 1
    return Tokenizer(list(dict.fromkeys(merges)) + sorted(letters))
