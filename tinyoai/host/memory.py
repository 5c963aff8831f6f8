"""Memory of the machine, of this process's cgroups and of processes, from /proc and /sys. Sizes are in bytes."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_CGROUPS = Path("/sys/fs/cgroup")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def unshared(pid: int) -> int:
    """Resident memory without mapped files, which the kernel can drop; 0 if the process is gone."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0


def resident(pid: int) -> int:
    """Resident memory with shared pages divided among their users (Pss); 0 if the process is gone.

    Takes milliseconds.
    """
    try:
        found = re.search(r"^Pss:\s*(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def available() -> int | None:
    """Available memory: the minimum of MemAvailable and of what each cgroup limit leaves. None if unknown."""
    known = [free for free in (_machine(), *_each_cgroup(_free)) if free is not None]
    return min(known) if known else None


def total() -> int | None:
    """The machine's memory; None if unknown."""
    return _meminfo("MemTotal")


def capacity() -> int | None:
    """Memory that this process may ever use: the machine's, or the least cgroup limit below it. None if unknown."""
    known = [most for most in (total(), *_each_cgroup(_limit)) if most is not None]
    return min(known) if known else None


def _machine() -> int | None:
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


class _Files(NamedTuple):
    """The names of a cgroup's files, by the version of cgroups."""

    limit: str
    used: str
    prefix: str
    """Of the keys in memory.stat that include the groups below."""


def _each_cgroup(read: Callable[[Path, _Files], int | None]) -> list[int | None]:
    """Returns what `read` says of each cgroup that contains this process; None: no limit or unknown."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            top, files = _CGROUPS, _Files("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top = _CGROUPS / "memory"
            files = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # in a container the path may be the host's, and its own cgroup is mounted at the top
        own = top / path.lstrip("/")
        for group in (own, *own.parents):
            if group == top or top in group.parents:
                found.append(read(group, files))
    return found


def _limit(group: Path, files: _Files) -> int | None:
    """A cgroup's limit."""
    try:
        return int((group / files.limit).read_text())  # "max" is no number
    except (OSError, ValueError):
        return None


def _free(group: Path, files: _Files) -> int | None:
    """A cgroup's limit minus its use; file cache counts as free, since the kernel can drop it."""
    limit = _limit(group, files)
    if limit is None:
        return None
    try:
        stat = (group / "memory.stat").read_text()
        cached = sum(
            int(number)
            for number in re.findall(rf"^{files.prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE)
        )
        return max(0, limit - int((group / files.used).read_text()) + cached)
    except (OSError, ValueError):
        return None
