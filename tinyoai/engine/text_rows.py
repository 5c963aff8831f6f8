"""A text that has one result, and its rows: all of it in one row, or parts of it and then its last token alone."""

from collections.abc import Sequence

from tinyoai import wire
from tinyoai.engine import adapter_set
from tinyoai.engine.contract import Adapter, Capabilities, Engine, Row, Want


class TextTask:
    """The part of the Task protocol that texts with one result share. Their sequences are not worth keeping."""

    keeps_prefix = False
    exact = True
    n_resumable = checkpoint = 0
    cache_miss = -1

    def __init__(self, request_id: int, ids: list[int], engine: Engine, *, in_parts: bool) -> None:
        """`in_parts`: the beginning of the text may come from a cache."""
        self.ids = ids
        self.n_expected = len(ids)
        self.adapters: tuple[Adapter, ...] = adapter_set.chosen(None, engine.info.adapters)
        self.prefilling = True
        self.ended = False
        self.n_reusable = n_reusable(len(ids), engine.caps) if in_parts else 0
        self._id = request_id
        self._caps = engine.caps
        self._seq = -1
        self._n_past = 0

    def start(self, seq: int, n_cached: int, now: float) -> list[wire.ToServer]:
        """See Task."""
        self._seq, self._n_past = seq, n_cached
        return []

    def move(self, seq: int) -> None:
        """See Task."""
        self._seq = seq


def n_reusable(n: int, caps: Capabilities) -> int:
    """Leading tokens of a text of n that may come from a cache: all, or all before a last block that ends with it.

    The last token is evaluated alone, so that block is never complete in one row here, but may be in a cache.
    """
    return n if n % caps.align else n - caps.align


def whole(
    seq: int, ids: Sequence[int], budget: int, caps: Capabilities, want: Want, adapters: tuple[Adapter, ...]
) -> Row | None:
    """The one row of a text; None: not with this budget."""
    return Row(seq, ids, 0, want, adapters) if len(ids) <= max(budget, caps.n_row) else None


def in_parts(
    seq: int,
    ids: Sequence[int],
    begin: int,
    budget: int,
    caps: Capabilities,
    want: Want,
    adapters: tuple[Adapter, ...],
) -> Row:
    """The row of a text whose first `begin` tokens are evaluated."""
    n = len(ids)
    if begin == n - 1:
        return Row(seq, ids[begin:], begin, want, adapters)
    end = min(n - 1, begin + budget, begin + caps.n_row)
    if end - end % caps.align > begin:
        end -= end % caps.align
    return Row(seq, ids[begin:end], begin, Want.NOTHING, adapters)
