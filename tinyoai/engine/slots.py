"""Slots: which tokens each KV cache sequence holds, and who gets which slot.

Owns the choice of a slot for a prompt, by longest common prefix, so that a conversation finds its
own cache again, and the rule of when a cached token is bit for bit what a fresh prefill would give.
Pure: values in, values out. It must not know engines, requests or time.

An engine adds up attention in blocks of positions. A token evaluated in a chunk that reaches the end of
the token's block is summed in one order ("whole"), else in another ("part"), with slightly different
results. A fresh prefill of n tokens is whole up to the last full block and part after it.
"""

from collections.abc import Sequence


class Slot:
    """One KV cache sequence. `tokens` are the ids evaluated in it, in order."""

    __slots__ = ("_whole", "block", "busy", "index", "last_used", "tokens")

    def __init__(self, index: int, block: int = 1) -> None:
        self.index = index
        self.block = block
        self.tokens: list[int] = []
        self._whole = bytearray()
        """For each token 1 if its chunk reached the end of its block."""
        self.busy = False
        self.last_used = 0
        """The count of assignments when it was last given out: 0 is never."""

    def append(self, tokens: Sequence[int]) -> None:
        """These were evaluated in one chunk."""
        begin = len(self.tokens)
        self.tokens += tokens
        end = len(self.tokens)
        n_whole = max(begin, end - end % self.block) - begin
        self._whole += b"\1" * n_whole + b"\0" * (end - begin - n_whole)

    def cut(self, n_keep: int) -> None:
        """Forgets all but the first tokens."""
        del self.tokens[n_keep:]
        del self._whole[n_keep:]

    def n_exact(self, n_keep: int, n_prompt: int) -> int:
        """How many of the first n_keep tokens are what a fresh prefill of n_prompt tokens gives."""
        full = n_prompt - n_prompt % self.block
        first_part = self._whole.find(0, 0, min(n_keep, full))
        if first_part >= 0:
            return first_part
        first_whole = self._whole.find(1, full, n_keep)
        return first_whole if first_whole >= 0 else n_keep


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens are equal; O(length), by halves compared in C."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def choose(slots: Sequence[Slot], prompt: Sequence[int], *, exact: bool) -> tuple[Slot, int] | None:
    """The free slot for this prompt and how many of its tokens to keep; None if all are busy.

    With `exact` only what is bit for bit as in a fresh prefill is kept. At least one prompt token is
    always left to evaluate, since its logits are wanted. A slot is worth what it saves now less half of
    what its own conversation would miss later; where none is worth anything, the one unused for longest
    is taken, so that a few shared tokens do not let one conversation evict another.
    """
    free = [slot for slot in slots if not slot.busy]
    if not free:
        return None

    def kept(slot: Slot) -> int:
        n_keep = min(common_prefix(slot.tokens, prompt), len(prompt) - 1)
        return slot.n_exact(n_keep, len(prompt)) if exact else n_keep

    keep = {slot.index: kept(slot) for slot in free}

    def worth(slot: Slot) -> tuple[float, int]:
        n_keep = keep[slot.index]
        return max(0.0, n_keep - (len(slot.tokens) - n_keep) / 2), -slot.last_used

    best = max(free, key=worth)
    return best, keep[best.index]
