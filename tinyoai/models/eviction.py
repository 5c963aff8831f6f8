"""What must be unloaded so that a model can be loaded. Pure: numbers in, a decision out.

Owns the rule: never one in use, the least recently used first, and nothing at all where that would not be
enough. It has no clock, no process and no await, and must not know how sizes are come by.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Loaded(NamedTuple):
    """A model that holds memory, or is about to. `size` is in bytes, `last_use` in seconds of any one clock."""

    name: str
    size: int
    uses: int
    last_use: float


class Decision(NamedTuple):
    """Unload these, in this order, and load; or wait until one is idle; or never."""

    unload: tuple[str, ...] = ()
    wait: bool = False
    refuse: bool = False


def plan(loaded: Sequence[Loaded], wanted: int, budget: int) -> Decision:
    """What to do before `wanted` bytes are loaded beside `loaded`, all within `budget` bytes."""
    if wanted > budget:
        return Decision(refuse=True)
    missing = sum(model.size for model in loaded) + wanted - budget
    chosen = []
    for model in sorted(loaded, key=lambda model: model.last_use):
        if missing <= 0:
            break
        if not model.uses:
            chosen.append(model.name)
            missing -= model.size
    return Decision(unload=tuple(chosen)) if missing <= 0 else Decision(wait=True)
