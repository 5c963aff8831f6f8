"""Slots: the tokens that each KV sequence holds, and whether a request uses it."""

from array import array
from collections.abc import Sequence

from tinyoai.engine.contract import Adapter


class Slot:
    """One KV sequence. `tokens` are the ids evaluated in it, in order."""

    __slots__ = (
        "adapters",
        "busy",
        "conversation",
        "index",
        "last_used",
        "n_resumable",
        "n_whole",
        "scope",
        "tokens",
        "used_at",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.adapters: tuple[Adapter, ...] = ()
        self.n_whole = 0
        """First tokens that are kept together or not at all: they come from a saved state that cannot be truncated."""
        self.conversation = 0
        """A number that the states saved of it share; 0: none yet."""
        self.n_resumable = 0
        """First tokens that other prompts of its conversation are likely to begin with; 0: not known."""
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
        if n_keep < self.n_whole:
            self.n_whole = 0

    def keepable(self, n: int) -> int:
        """How many of its first n tokens can be kept: n, or 0."""
        return n if n >= self.n_whole else 0

    def ids(self, n: int) -> "array[int]":
        """Its first n tokens in the form that the prefix store compares."""
        return array("i", self.tokens[:n])
