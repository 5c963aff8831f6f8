"""The number of threads of a step: as many as the machine has, if they make this model faster.

Threads that share a step wait for each other hundreds of times, and they spin meanwhile. If another program takes one
of their cores, each wait lasts until the kernel gives it back, and a step of 8 ms takes seconds.
"""

import math
from collections.abc import Callable

from tinyoai.host.cores import available as available

ENOUGH_S = 0.3
"""Seconds after which a number of threads is not timed again: a large model's load is slow enough."""
REPEATS = 3


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

    All threads are used while a token costs less with them than with one. If not, one thread is used, and all are
    tried again after a pause that doubles while the trials fail. `allow` changes how many "all" are.
    """

    FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 60.0
    PATIENCE = 2.0
    """A step with all threads may last this many times as long as with one."""
    SPARE_S = 0.02

    def __init__(self, most: int, single_s: float, clock: Callable[[], float]) -> None:
        """`most` is the number of all threads; `single_s` a step with one token on one; `clock` gives seconds."""
        self.n = most
        """Threads of the next step."""
        self._all = self._most = most
        """The machine's, and those of them that are allowed now."""
        self._clock = clock
        # by kind: steps with one token (False) and with several (True), of which each costs less
        self._single = {False: single_s, True: single_s}
        """Seconds for each token with one thread."""
        self._trial = True
        self._n_slow = 0
        self._pause_s = self.FIRST_PAUSE_S
        self._try_at = 0.0

    def limit_s(self, n_tokens: int) -> float:
        """Seconds after which the next step should be given up and begun again with one thread."""
        if self.n == 1:
            return math.inf
        return self.PATIENCE * n_tokens * self._single[n_tokens > 1] + self.SPARE_S

    def note(self, n_tokens: int, seconds: float) -> None:
        """Records a step with `n` threads, and chooses those of the next."""
        kind, cost = n_tokens > 1, seconds / n_tokens
        if self.n == 1:
            self._single[kind] = cost
            if self._clock() >= self._try_at:
                self.n, self._trial = self._most, True
            return
        if cost <= self._single[kind]:
            self._trial, self._n_slow, self._pause_s = False, 0, self.FIRST_PAUSE_S
            return
        self._n_slow += 1
        if self._trial or self._n_slow == 2:  # one slow step may be a hiccup
            self.give_up()

    def allow(self, n: int) -> None:
        """From the next step on, at most n threads are used. Another number of threads is tried as the first was."""
        most = max(1, min(self._all, n))
        if most == self._most:
            return
        self._most, self._trial, self._n_slow = most, True, 0
        self.n = most if self._clock() >= self._try_at else 1

    def give_up(self) -> None:
        """Uses one thread for a while."""
        if self._trial:
            self._pause_s = min(self.LAST_PAUSE_S, 2 * self._pause_s)
        self.n, self._n_slow = 1, 0
        self._try_at = self._clock() + self._pause_s
