"""How much memory there is, and how much a process holds.

Owns the reading of /proc and of the cgroup. It must not know models, nor what is to be done when memory is
short. All sizes are in bytes.
"""

import os
import re
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_PAGE = os.sysconf("SC_PAGE_SIZE")


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


def machine() -> int | None:
    """All that the machine has; None if nothing says."""
    return _meminfo("MemTotal")


def _machine() -> int | None:
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
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
