"""How much memory there is, how much a process holds, and how much a model will need.

Owns the reading of /proc and of the cgroup, and the estimate from a model's shape. It must not know what
is loaded or what is to be done when memory is short. All sizes are in bytes.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from tinyoai import wire
from tinyoai.registry import Model

BASE = 40 << 20
"""A worker without a model, with its interpreter and libraries."""
BLOCK = 32
"""Context windows are told in multiples of this."""
SHARE = 0.9
"""How much of what can be had is used where no budget is set: the rest is for everything else."""

_CGROUPS = Path("/sys/fs/cgroup")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Need(NamedTuple):
    """What a model takes: `fixed`, and `per_token` of its context window over all slots."""

    fixed: int
    per_token: int
    n_ctx: int

    @property
    def total(self) -> int:
        """With its whole context window filled in every slot."""
        return self.fixed + self.per_token * self.n_ctx

    def largest_context(self, budget: int) -> int:
        """The context window in tokens that would fit; 0 if not even one block would, or none would help."""
        if not self.per_token or self.fixed >= budget:
            return 0
        fits = (budget - self.fixed) // self.per_token
        return min(fits, self.n_ctx) // BLOCK * BLOCK


def need(model: Model, load: wire.Load) -> Need:
    """The estimate: the file, which is mapped; a KV cache of two F16 numbers for each layer and position, and
    scratch for a batch, in every slot. Without a shape (legacy files, the scripted engine) the file alone."""
    shape = model.shape
    if shape is None:
        return Need(BASE + model.size, 0, load.n_ctx)
    n_gqa = shape.n_embd // shape.n_head * shape.n_head_kv
    cache = 2 * 2 * shape.n_layer * n_gqa
    # F32 in both: attention of a batch over the whole context, its scores and their softmax; and a batch's rows,
    # several of the model's width at a time, the feed-forward's and the logits
    attention = 2 * 4 * load.n_batch * shape.n_head
    rows = 4 * load.n_batch * (8 * shape.n_embd + 3 * shape.n_ff + shape.n_vocab)
    return Need(BASE + model.size + load.n_slots * rows, load.n_slots * (cache + attention), load.n_ctx)


def held(pid: int) -> int:
    """What a process holds for itself alone, mapped files not among it, since the kernel drops those; 0 if gone."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0


def resident(pid: int) -> int:
    """What a process has in memory: each page once, however often it is mapped; 0 if gone. Takes milliseconds."""
    try:
        found = re.search(r"^Pss:\s*(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def available() -> int | None:
    """Bytes that can still be had: of the machine, and of this process's cgroup; None if nothing says."""
    found = [_machine(), *_cgroup()]
    known = [room for room in found if room is not None]
    return min(known) if known else None


def _machine() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _cgroup() -> list[int | None]:
    """What every cgroup above this process leaves, of either version."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            top, limit, used, prefix = _CGROUPS, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, used = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            prefix = "total_"
        else:
            continue
        # in a container the path may be the host's, and its own cgroup stands at the top
        here = top / path.lstrip("/")
        for place in (here, *here.parents):
            if place == top or top in place.parents:
                rooms.append(_left(place, limit, used, prefix))
    return rooms


def _left(place: Path, limit: str, used: str, prefix: str) -> int | None:
    """A cgroup's limit less what is in use and no file's cache, which the kernel gives back when asked to."""
    try:
        most = (place / limit).read_text().strip()
        if most == "max":
            return None
        stat = (place / "memory.stat").read_text()
        cached = sum(
            int(number) for number in re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE)
        )
        return max(0, int(most) - int((place / used).read_text()) + cached)
    except (OSError, ValueError):
        return None
