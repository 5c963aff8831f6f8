"""Measures the cost of a decode step by its number of rows, while an engine has nothing else to do."""

import math
from collections.abc import Callable

from tinyoai.engine.contract import Engine, EngineError, Interrupted, NoRoom, Partial, Row
from tinyoai.engine.sequences import Sequences
from tinyoai.engine.step_cost import DecodeCost

REPEATS = 3
ENOUGH_S = 0.3
"""Seconds after which a size is not timed again."""
LIMIT_S = 2.0
"""Seconds that an evaluation may take, where it can be interrupted: a request may arrive meanwhile."""


class Calibration:
    """Fills the cost table of an engine whose rows share work, one size at a time."""

    def __init__(
        self,
        engine: Engine,
        sequences: Sequences,
        cost: DecodeCost,
        clock: Callable[[], float],
        *,
        may_evict: bool = False,
    ) -> None:
        """`may_evict`: evicted sequences are not lost."""
        self._may_evict = may_evict
        self._engine = engine
        self._sequences = sequences
        self._cost = cost
        self._clock = clock
        n_seq = engine.caps.n_seq
        sizes = [n for n in DecodeCost.SIZES if n <= n_seq] if engine.caps.batches else []
        self.sizes = sizes if len(sizes) > 1 else []
        """Sizes that are not measured yet."""
        self._found: dict[int, float] = {}

    def measure(self) -> None:
        """Times steps of the next size in empty slots. No task may have a slot.

        If slots are not empty and may not be evicted, or an evaluation takes too long, nothing more is measured.
        """
        n = self.sizes.pop(0)
        slots = self._sequences.slots[:n]
        if not self._may_evict and any(slot.tokens for slot in slots):
            self.sizes.clear()
            return
        for slot in slots:
            if slot.tokens:
                self._sequences.evict(slot)
        info = self._engine.info
        token = info.bos_id if 0 <= info.bos_id < info.n_vocab else 0
        best, total = math.inf, 0.0
        try:
            for pos in range(1 + REPEATS):
                begin = self._clock()
                self._engine.eval([Row(slot.index, [token], pos) for slot in slots], begin + LIMIT_S)
                seconds = self._clock() - begin
                total += seconds
                if pos:  # the first one builds what the others use
                    best = min(best, seconds)
                    if total > ENOUGH_S:
                        break
        except (EngineError, Interrupted, NoRoom, Partial):
            self.sizes.clear()
            return
        finally:
            for slot in slots:
                self._sequences.cut(slot, 0)
        self._found[n] = best
        if not self.sizes:
            self._cost.seconds = self._found
