"""Decides which models to unload so that another fits. Pure: numbers in, a decision out.

A model in use is never unloaded, the least recently used goes first, and nothing is unloaded in vain.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Loaded(NamedTuple):
    """A model that holds memory, or is about to. `size` is in bytes, `last_used` in seconds of one clock."""

    name: str
    size: int
    n_leases: int
    last_used: float


class Decision(NamedTuple):
    """Unload these in this order and load, or wait until a model is idle, or refuse."""

    unload: tuple[str, ...] = ()
    wait: bool = False
    refuse: bool = False


def plan(loaded: Sequence[Loaded], wanted: int, budget: int) -> Decision:
    """Returns what to do before `wanted` bytes are loaded beside `loaded` within `budget` bytes."""
    if wanted > budget:
        return Decision(refuse=True)
    missing = sum(model.size for model in loaded) + wanted - budget
    chosen = []
    for model in sorted(loaded, key=lambda model: model.last_used):
        if missing <= 0:
            break
        if not model.n_leases:
            chosen.append(model.name)
            missing -= model.size
    return Decision(unload=tuple(chosen)) if missing <= 0 else Decision(wait=True)
