"""Prefix reuse: the slot for a prompt, by the longest prefix that is in a KV sequence already.

Pure but for two questions to the engine: its capabilities and `exact_prefix`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tinyoai.engine.contract import Adapter, Capabilities, Copies, Truncates
from tinyoai.engine.prefix_store import Entry, common_prefix
from tinyoai.engine.slots import Slot

__all__ = ["Assignment", "choose", "common_prefix", "packed"]


class Assignment(NamedTuple):
    """Use `slot`, keep its first `n_keep` tokens; with a `source` or `entry` take them from there first."""

    slot: Slot
    n_keep: int
    source: Slot | None = None
    entry: Entry | None = None


def choose(
    slots: Sequence[Slot],
    prompt: Sequence[int],
    caps: Capabilities,
    *,
    n_reusable: int,
    adapters: tuple[Adapter, ...] = (),
    scope: str = "",
    exact: Callable[[int, int, int], int] | None = None,
) -> Assignment | None:
    """The assignment for a prompt; None if all slots are busy.

    At most the first `n_reusable` tokens may come from a cache, and never the last one, since its logits are
    wanted; none come from another scope. `exact(seq, n, n_prompt)` limits reuse to tokens that equal a fresh prefill
    bit for bit. A slot is worth what it saves now less half of what its own conversation would miss later. If none is
    worth anything, the least recently used slot is taken, so that a few shared tokens do not let one conversation
    evict another.
    """
    free = [slot for slot in slots if not slot.busy]
    if not free:
        return None
    most = min(n_reusable, len(prompt) - 1)

    def kept(slot: Slot) -> int:
        if slot.adapters != adapters or slot.scope != scope:
            return 0
        n_keep = slot.keepable(min(common_prefix(slot.tokens, prompt), most))
        if caps.truncates is Truncates.NEVER and n_keep < len(slot.tokens):
            return 0
        return exact(slot.index, n_keep, len(prompt)) if exact is not None else n_keep

    keep = {slot.index: kept(slot) for slot in free}

    def worth(slot: Slot) -> tuple[float, int]:
        n_keep = keep[slot.index]
        return max(0.0, n_keep - (len(slot.tokens) - n_keep) / 2), -slot.last_used

    best = max(free, key=worth)
    if caps.copies is not Copies.NONE:
        copied = _copy(slots, free, best, keep[best.index], kept, caps)
        if copied is not None:
            return copied
    return Assignment(best, keep[best.index])


def _copy(
    slots: Sequence[Slot],
    free: Sequence[Slot],
    best: Slot,
    n_best: int,
    kept: Callable[[Slot], int],
    caps: Capabilities,
) -> Assignment | None:
    """A copy of another slot's prefix into the least recently used free slot, if that keeps more."""

    def copyable(slot: Slot) -> int:
        n = kept(slot)
        cuts = caps.truncates is Truncates.FREELY and (caps.cuts_saved or caps.shares_cells)
        return n if caps.copies is Copies.PREFIX or n == len(slot.tokens) or cuts else 0

    source = max(slots, key=copyable)
    n_keep = copyable(source)
    # a free slot that gives up its own tokens for a few more copied ones is no gain
    if n_keep <= n_best or (source is best):
        return None
    targets = [slot for slot in free if slot is not source]
    if not targets:
        return None
    return Assignment(min(targets, key=lambda slot: slot.last_used), n_keep, source)


def packed(found: Assignment, slots: Sequence[Slot]) -> Assignment:
    """The assignment in the free slot next to busy ones, for engines that evaluate rows of neighbours together.

    What the chosen slot holds is copied from there. If no slot is busy, the assignment stays as it is.
    """
    busy = [slot.index for slot in slots if slot.busy]
    if not busy:
        return found
    free = (slot for slot in slots if not slot.busy)
    first = min(free, key=lambda slot: min(abs(slot.index - index) for index in busy))
    if first is found.slot:
        return found
    if first is found.source:
        return Assignment(first, found.n_keep)
    if found.source is None and found.entry is None and found.n_keep:
        return Assignment(first, found.n_keep, found.slot)
    return found._replace(slot=first)
