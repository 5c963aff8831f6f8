"""How many threads one step may use: what the machine has, and what helps this model.

Owns that choice, made once after the load by measuring. ctransformers' worker threads spin, so one
thread too many can cost tenfold, and for small models one thread is the fastest outright. It knows
an engine only by its protocol.
"""

import os
import time
from pathlib import Path

from tinyoai.engine.contract import Engine, Row


def available() -> int:
    """Cores that this process may use at once: its affinity, held under its cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):
        pass  # no cgroup v2: the affinity alone counts
    return max(1, cores)


def measure(engine: Engine) -> int:
    """Threads for a step with one row: one, or all cores but the one left to the server.

    Times a few single-token evaluations each way and takes the faster. Raises EngineError as the
    engine does.
    """
    most = available() - 1
    if most <= 1:
        return 1
    token = max(engine.info.bos_id, 0)

    def best_of(n_threads: int) -> float:
        times = []
        for n_past in range(4):
            started = time.perf_counter()
            engine.eval([Row(0, [token], n_past)], n_threads)
            times.append(time.perf_counter() - started)
        return min(times[1:])

    return most if best_of(most) < best_of(1) else 1
