"""The number of threads of a step: as many as the machine has, if they make this model faster.

Threads that share a step wait for each other hundreds of times, and they spin meanwhile. If another program takes one
of their cores, each wait lasts until the kernel gives it back, and a step of 8 ms takes seconds.
"""

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


class ThreadChoice:
    """Chooses between all threads and one, step by step, by what the last steps cost.

    All threads are used until two steps in a row cost SLOW times as much for each token as the best ones did. Then
    one thread is used, and all are tried again after a pause that doubles while the trials fail.
    """

    SLOW = 3.0
    FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 60.0
    FORGET = 1.01
    """The best cost grows by this with each step, since a longer context makes steps slower."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        """`most` is the number of all threads; `clock` gives seconds."""
        self.n = most
        """Threads of the next step."""
        self._most = most
        self._clock = clock
        self._best: dict[bool, float] = {}
        """Seconds for each token with all threads, of steps with one token (False) and with several (True)."""
        self._single: dict[bool, float] = {}
        """The same with one thread, of the last step."""
        self._n_slow = 0
        self._pause_s = self.FIRST_PAUSE_S
        self._try_at = 0.0

    def note(self, n_tokens: int, seconds: float) -> None:
        """Records a step with `n` threads, and chooses those of the next."""
        if self._most == 1:
            return
        kind, cost = n_tokens > 1, seconds / n_tokens
        if self.n == 1:
            self._single[kind] = cost
            if self._clock() >= self._try_at and kind in self._single:
                self.n = self._most
            return
        known = self._single.pop(kind, None)
        if known is not None:  # a trial
            if cost < known:
                self._pause_s = self.FIRST_PAUSE_S
                self._single.clear()
            else:
                self._pause_s = min(self.LAST_PAUSE_S, 2 * self._pause_s)
                self._use_one()
                return
        best = min(cost, self._best.get(kind, cost) * self.FORGET)
        self._best[kind] = best
        self._n_slow = self._n_slow + 1 if cost > self.SLOW * best else 0
        if self._n_slow == 2:
            self._use_one()

    def _use_one(self) -> None:
        self.n, self._n_slow = 1, 0
        self._try_at = self._clock() + self._pause_s
