"""Slots: the tokens that each KV sequence holds, and whether a request uses it."""

from collections.abc import Sequence

from tinyoai.engine.contract import Adapter


class Slot:
    """One KV sequence. `tokens` are the ids evaluated in it, in order."""

    __slots__ = ("adapters", "busy", "index", "last_used", "tokens")

    def __init__(self, index: int) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.adapters: tuple[Adapter, ...] = ()
        self.busy = False
        self.last_used = 0
        """The number of the assignment that gave it out last; 0: never."""

    def append(self, tokens: Sequence[int]) -> None:
        """Records tokens that were evaluated."""
        self.tokens += tokens

    def cut(self, n_keep: int) -> None:
        """Records that all but the first tokens were dropped."""
        del self.tokens[n_keep:]
