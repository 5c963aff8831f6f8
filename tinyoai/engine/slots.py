"""Slots: the tokens that each KV sequence holds, and whether a request uses it."""

from array import array
from collections.abc import Sequence

from tinyoai.engine.contract import Adapter


class Slot:
    """One KV sequence. `tokens` are the ids evaluated in it, in order."""

    __slots__ = ("adapters", "busy", "index", "last_used", "scope", "tokens", "used_at")

    def __init__(self, index: int) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.adapters: tuple[Adapter, ...] = ()
        self.scope = ""
        """The scope of its last request: no other may reuse its tokens."""
        self.busy = False
        self.last_used = 0
        """The number of the assignment that gave it out last; 0: never."""
        self.used_at = 0.0
        """The end of its last request, in seconds since 1970."""

    def append(self, tokens: Sequence[int]) -> None:
        """Records tokens that were evaluated."""
        self.tokens += tokens

    def cut(self, n_keep: int) -> None:
        """Records that all but the first tokens were dropped."""
        del self.tokens[n_keep:]

    def ids(self) -> "array[int]":
        """Its tokens in the form that the prefix store compares."""
        return array("i", self.tokens)
