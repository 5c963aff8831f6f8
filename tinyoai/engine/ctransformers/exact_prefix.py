"""Finds the tokens of a sequence that equal a fresh prefill bit for bit.

The library sums attention in blocks of positions. A token evaluated in a chunk that reaches the end of the token's
block is summed in one order ("whole"), else in another ("partial"), with slightly different results. A fresh
prefill of n tokens is whole up to the last full block and partial after it.
"""

ATTN_BLOCK = 32
"""Positions in a block; the library sums what is left over one by one."""


class ExactPrefix:
    """The order in which each token of one sequence was summed."""

    __slots__ = ("_block", "_whole")

    def __init__(self, block: int = ATTN_BLOCK) -> None:
        self._block = block
        self._whole = bytearray()
        """For each token 1 if its chunk reached the end of its block."""

    def append(self, n: int) -> None:
        """Adds n tokens that were evaluated in one chunk."""
        begin = len(self._whole)
        end = begin + n
        n_whole = max(begin, end - end % self._block) - begin
        self._whole += b"\1" * n_whole + b"\0" * (n - n_whole)

    def truncate(self, n: int) -> None:
        """Drops all but the first n tokens."""
        del self._whole[n:]

    def length(self, n: int, n_prompt: int) -> int:
        """Returns how many of the first n tokens equal a fresh prefill of n_prompt tokens."""
        full = n_prompt - n_prompt % self._block
        first_partial = self._whole.find(0, 0, min(n, full))
        if first_partial >= 0:
            return first_partial
        first_whole = self._whole.find(1, full, n)
        return first_whole if first_whole >= 0 else min(n, len(self._whole))
