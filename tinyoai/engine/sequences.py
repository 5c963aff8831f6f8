"""The KV sequences of an engine: the tokens that each slot holds, and the KV cells that they take together."""

from collections.abc import Callable, Sequence

from tinyoai.engine.cells import CellCount
from tinyoai.engine.contract import Copies, Engine, EngineError
from tinyoai.engine.slots import Slot


class Sequences:
    """Slots, and every call to the engine that changes what they hold."""

    def __init__(self, engine: Engine) -> None:
        self.slots = [Slot(i) for i in range(engine.caps.n_seq)]
        self._engine = engine
        self._caps = engine.caps
        self._cells = CellCount(engine.caps.n_seq)
        self.on_evict: Callable[[Slot], None] = lambda slot: None
        """Called with each slot before its tokens are dropped for want of cells."""

    @property
    def n_free(self) -> int:
        """KV cells that hold nothing."""
        return self._caps.n_kv - self._cells.n_used

    @property
    def n_idle(self) -> int:
        """KV cells that are free once all idle slots are dropped, beside the free ones."""
        busy = [slot.index for slot in self.slots if slot.busy]
        return self._cells.n_used - self._cells.n_used_by(busy)

    def least_recent(self) -> Slot | None:
        """The idle slot with tokens that was used least recently; None if there is none."""
        idle = [slot for slot in self.slots if slot.tokens and not slot.busy]
        return min(idle, key=lambda slot: slot.last_used, default=None)

    def append(self, slot: Slot, tokens: Sequence[int]) -> None:
        """Records tokens that were evaluated in a slot."""
        slot.append(tokens)
        self._cells.append(slot.index, len(tokens))

    def cut(self, slot: Slot, n: int) -> int:
        """Drops all but the first n tokens of a slot; returns how many are kept: n, fewer, or 0."""
        kept = self._engine.truncate(slot.index, slot.keepable(n))
        slot.cut(kept)
        self._cells.cut(slot.index, kept)
        return kept

    def evict(self, slot: Slot) -> None:
        """Drops the tokens of an idle slot."""
        self.on_evict(slot)
        self.cut(slot, 0)

    def free(self, n: int) -> bool:
        """Evicts idle slots, the least recently used first, until n cells are free. False: there are not as many."""
        while n > self.n_free and (slot := self.least_recent()) is not None:
            self.evict(slot)
        return n <= self.n_free

    def copy(self, source: Slot, slot: Slot, n: int) -> None:
        """Replaces a slot's tokens by the first n of another one's, or by all of them if the engine copies no part.

        The slot is empty if the engine fails.
        """
        if self._caps.copies is not Copies.PREFIX:
            n = len(source.tokens)
        try:
            self._engine.copy(source.index, slot.index, n)
        except EngineError:
            slot.tokens = []
            self.cut(slot, 0)
            return
        slot.tokens = source.tokens[:n]
        # without shared cells it is a saved state that is copied
        slot.n_whole = source.n_whole if self._caps.cuts_saved or self._caps.shares_cells else n
        self._cells.copy(source.index, slot.index, n)

    def save(self, slot: Slot) -> bytes:
        """The state of a slot, for `load`."""
        return self._engine.save(slot.index)

    def load(self, slot: Slot, tokens: Sequence[int], state: bytes) -> bool:
        """Replaces a slot's tokens by a saved state of them; False, and an empty slot, if the state does not fit."""
        fits = self._engine.load(slot.index, state)
        self._cells.cut(slot.index, 0)
        slot.tokens = list(tokens) if fits else []
        slot.n_whole = 0 if self._caps.cuts_saved else len(slot.tokens)
        self._cells.append(slot.index, len(slot.tokens))
        return fits
