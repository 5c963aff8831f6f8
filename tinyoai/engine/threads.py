"""The number of threads of a step: as many as the machine has, if they make this model faster."""

import os
from collections.abc import Callable
from pathlib import Path

ENOUGH_S = 0.3
"""Seconds after which a number of threads is not timed again: a large model's load is slow enough."""
REPEATS = 3


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


def measure(step: Callable[[int], None], n_threads: int, clock: Callable[[], float]) -> tuple[int, float]:
    """The number of threads for a step with one row, and the seconds that the step then takes.

    `step` evaluates a token with a number of threads, and has run before. With n_threads 0, one thread competes
    with all cores but one, which is left to the server. Worker threads that spin, as those of ctransformers do,
    make a step ten times slower when there is one too many, and for small models one thread is the fastest.
    """

    def best_of(n: int, warm: bool) -> float:
        if not warm:
            step(n)  # the first step with other threads starts them
        begin = before = clock()
        best = float("inf")
        for _ in range(REPEATS):
            step(n)
            now = clock()
            best = min(best, now - before)
            before = now
            if now - begin > ENOUGH_S:
                break
        return best

    if n_threads:
        return n_threads, best_of(n_threads, n_threads == 1)
    one = best_of(1, True)
    most = available() - 1
    if most <= 1:
        return 1, one
    many = best_of(most, False)
    return (most, many) if many < one else (1, one)
