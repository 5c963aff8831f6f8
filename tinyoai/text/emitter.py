"""Token bytes to text that is safe to send: leading space, stop sequences, code points.

Text that could still become a stop sequence stays inside, no code point is split, and the text is the same however
the bytes are cut.
"""

import codecs
from collections.abc import Sequence

from tinyoai.native import StopMatcher

_decoder = codecs.getincrementaldecoder("utf-8")


class Emitter:
    """The text of one choice."""

    __slots__ = ("_matcher", "_n_split", "_strip", "_utf8", "n_fed", "n_out", "stopped")

    def __init__(self, stop: Sequence[str], strip_leading_space: bool) -> None:
        """Raises ValueError for stop sequences over the matcher's limits."""
        self._matcher = StopMatcher([sequence.encode() for sequence in stop]) if stop else None
        self._utf8 = _decoder("replace")
        self._n_split = 0
        """Bytes in the decoder: the beginning of a code point."""
        self._strip = strip_leading_space
        self.stopped = False
        """A stop sequence was found; nothing more comes out."""
        self.n_fed = 0
        """Bytes fed."""
        self.n_out = 0
        """Bytes whose text has been returned, a stripped leading space included."""

    def feed(self, piece: bytes) -> str:
        """The text that is safe to send after these bytes, often none."""
        if self.stopped:
            return ""
        self.n_fed += len(piece)
        if self._strip and piece:
            self._strip = False
            if piece.startswith(b" "):
                piece = piece[1:]
                self.n_out += 1
        if self._matcher is not None:
            piece, self.stopped = self._matcher.feed(piece)
        return self._decode(piece, final=self.stopped)

    def flush(self) -> str:
        """The held-back text, once no more bytes come; after a stop, none."""
        if self.stopped:
            return ""
        return self._decode(self._matcher.flush() if self._matcher is not None else b"", final=True)

    def _decode(self, piece: bytes, *, final: bool) -> str:
        if not self._n_split and piece.isascii():  # most text, at half the cost
            self.n_out += len(piece)
            return piece.decode("ascii")
        text = self._utf8.decode(piece, final)
        n_before, self._n_split = self._n_split, len(self._utf8.getstate()[0])
        self.n_out += n_before + len(piece) - self._n_split
        return text
