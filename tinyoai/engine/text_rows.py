"""The rows of a text that has one result: all of it in one row, or parts of it and then its last token alone."""

from collections.abc import Sequence

from tinyoai.engine.contract import Capabilities, Row, Want


def n_reusable(n: int, caps: Capabilities) -> int:
    """Leading tokens of a text of n that may come from a cache: all, or all before a last block that ends with it.

    The last token is evaluated alone, so that block is never complete in one row here, but may be in a cache.
    """
    return n if n % caps.align else n - caps.align


def whole(seq: int, ids: Sequence[int], budget: int, caps: Capabilities, want: Want) -> Row | None:
    """The one row of a text; None: not with this budget."""
    return Row(seq, ids, 0, want) if len(ids) <= max(budget, caps.n_row) else None


def in_parts(seq: int, ids: Sequence[int], begin: int, budget: int, caps: Capabilities, want: Want) -> Row:
    """The row of a text whose first `begin` tokens are evaluated."""
    n = len(ids)
    if begin == n - 1:
        return Row(seq, ids[begin:], begin, want)
    end = min(n - 1, begin + budget, begin + caps.n_row)
    if end - end % caps.align > begin:
        end -= end % caps.align
    return Row(seq, ids[begin:end], begin, Want.NOTHING)
