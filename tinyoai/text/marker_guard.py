"""Keeps user text from becoming control tokens on its way through a chat template.

A marker is the text of a control token. `weak` puts a sentinel character into every marker of a user's string, so
that after the rendering every marker in the output is the template's own, and the sentinels are taken out again.
A template can still build a marker from a user's pieces, by joining, cutting or lower-casing them. So a
conversation with suspicious strings is rendered a second time with `strong`, which parts all characters of those
strings. If the two renderings have different markers, the second one counts: no marker in it holds a user's
characters.
"""

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from tinyoai.wire import Segment, Special, Text

SENTINEL = "\ufdd0"
"""A noncharacter. A user's own becomes U+FFFD before the rendering."""

_BLANK = " \t\r\n\u2581"
"""Whitespace, and the character that some vocabularies write for a space."""


def is_marker(text: str) -> bool:
    """Whether the text of a control token can be mistaken for one: it is neither blank nor a plain word."""
    bare = text.strip(_BLANK)
    return len(bare) > 1 and re.fullmatch(r"\w+", bare) is None


class MarkerGuard:
    """The markers of one model."""

    def __init__(self, markers: Collection[str]) -> None:
        self.markers = frozenset(filter(is_marker, markers))
        self._lengths: dict[str, list[int]] = {}
        """By their first two characters: the lengths of markers, longest first."""
        for length, start in sorted({(len(m), m[:2]) for m in self.markers}, reverse=True):
            self._lengths.setdefault(start, []).append(length)
        self._starts = re.compile("|".join(map(re.escape, self._lengths)) or "(?!)")
        ends = {m[0] for m in self.markers} | {m[-1] for m in self.markers}
        self._ends = re.compile("[" + "".join(map(re.escape, ends)) + "]" if ends else "(?!)")
        self._all = "\n".join(self.markers).lower()
        self._longest = max(map(len, self.markers), default=0)

    def _find(self, text: str, *, overlapping: bool = False) -> Iterator[tuple[int, int]]:
        """The places of all markers from left to right; the longest wins at each place."""
        at = 0
        while found := self._starts.search(text, at):
            start = found.start()
            at = start + 1
            for length in self._lengths[found[0]]:
                if text[start : start + length] in self.markers:
                    yield start, start + length
                    if not overlapping:
                        at = start + length
                    break

    def suspicious(self, text: str) -> bool:
        """Whether a template could build a marker from this text."""
        if self._ends.search(text):
            return True
        bare = text.strip().lower()
        return 0 < len(bare) <= self._longest and bare in self._all

    def weak(self, text: str) -> str:
        """The text with a sentinel in each marker."""
        text = text.replace(SENTINEL, "\N{REPLACEMENT CHARACTER}")
        parts: list[str] = []
        at = 0
        for start, _ in self._find(text, overlapping=True):
            parts += text[at : start + 1], SENTINEL
            at = start + 1
        return "".join(parts) + text[at:] if parts else text

    def strong(self, text: str) -> str:
        """The text with sentinels around each character, if it is suspicious. Outer whitespace stays as it is."""
        text = text.replace(SENTINEL, "\N{REPLACEMENT CHARACTER}")
        if not self.suspicious(text):
            return text
        bare = text.strip()
        before, _, after = text.partition(bare)
        return before + SENTINEL + SENTINEL.join(bare) + SENTINEL + after

    def split(self, rendered: str) -> list[Segment]:
        """The output of a template as segments: its markers are control tokens, the rest is text."""
        segments: list[Segment] = []
        at = 0
        for start, end in [*self._find(rendered), (len(rendered), len(rendered))]:
            if text := rendered[at:start].replace(SENTINEL, ""):
                segments.append(Text(text))
            if end > start:
                segments.append(Special(rendered[start:end]))
            at = end
        return segments


def strings(value: Any) -> Iterator[str]:
    """All strings in decoded JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        yield from strings([*value, *value.values()])


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A deep copy of decoded JSON with all strings changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): map_strings(item, change) for key, item in value.items()}
    return value
