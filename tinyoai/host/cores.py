"""The processor cores that this process may use."""

import os
from pathlib import Path


def available() -> int:
    """Cores that this process may use at once: its affinity, limited by its cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):
        pass  # no cgroup v2: the affinity alone counts
    return max(1, cores)
