"""From a token's bytes to text that is safe to send.

Owns the way of an answer's bytes: one leading space off where the tokenizer put it, through the stop
matcher, into code points. Nothing that could still become a stop sequence leaves, no code point is
split, and however the bytes are cut, the text is the same. It must not know tokens or requests.
"""

import codecs
from collections.abc import Sequence

from tinyoai.native import StopMatcher

_decoder = codecs.getincrementaldecoder("utf-8")


class Emitter:
    """One answer's way out."""

    __slots__ = ("_matcher", "_strip", "_utf8", "n_fed", "n_out", "stopped")

    def __init__(self, stop: Sequence[str], strip_leading_space: bool) -> None:
        """Raises ValueError for stop sequences over the matcher's limits."""
        self._matcher = StopMatcher([sequence.encode() for sequence in stop]) if stop else None
        self._utf8 = _decoder("replace")
        self._strip = strip_leading_space
        self.stopped = False
        """A stop sequence was found; nothing more comes out."""
        self.n_fed = 0
        """Bytes that came in."""
        self.n_out = 0
        """Of those, the bytes whose text has been handed out, a space taken off included."""

    def feed(self, piece: bytes) -> str:
        """The text that these bytes make certain, often none."""
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
        """What was held back, once no more bytes come; after a stop, nothing."""
        if self.stopped:
            return ""
        return self._decode(self._matcher.flush() if self._matcher is not None else b"", final=True)

    def _decode(self, piece: bytes, *, final: bool) -> str:
        if piece or final:
            before = len(self._utf8.getstate()[0])
            text = self._utf8.decode(piece, final)
            self.n_out += before + len(piece) - len(self._utf8.getstate()[0])
            return text
        return ""
