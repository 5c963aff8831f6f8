"""The cost of a step: how many prompt tokens to evaluate at once.

A step is cut to about STEP_S seconds by measured cost, never below one token, so that a cancel, another stream and
the server's watchdog never wait long, however slow the device.
"""

from collections import deque

STEP_S = 0.5
"""Seconds that a prefill step should take at most."""
ALONE = 4.0
"""A step that nobody waits for, and that can be interrupted, may take this many times as long."""
RIDES_BELOW = 0.35
"""Decode rows ride with a prompt if 8 in one step take less than this share of their time in 8 steps."""
BESIDE = 2.0
"""A chunk beside decoding tasks may take this many times as long."""
GROW_BELOW = 0.6
"""A step that took less than this share of its time may be followed by one twice as large."""
RECENT = 3
"""Measured steps that count. The cheapest does: one hiccup of the machine must not change how prompts are cut."""


class StepCost:
    """Learns from every prefill step. `one_token_s` is the warm-up's time for one token."""

    def __init__(self, one_token_s: float, largest: int, align: int, chunk: int = 0) -> None:
        """`largest` is the most tokens of one step, `chunk` the most beside decoding tasks (0: as many).

        Cuts at multiples of `align` keep results bit-exact, or are fast.
        """
        self._chunk = min(chunk or largest, largest)
        self._target_s = max(STEP_S, 2 * one_token_s)
        self._largest = largest
        self._align = align
        self._recent: deque[tuple[int, float]] = deque([(1, one_token_s)], maxlen=RECENT)
        self._longest_s = one_token_s

    def add(self, n_tokens: int, seconds: float, *, typical: bool = True) -> None:
        """Records a prefill step. A small one that is not `typical` says little about the cost of a token."""
        if typical or seconds > self._target_s:
            self._recent.append((n_tokens, seconds))
        self._longest_s = max(seconds, 0.9 * self._longest_s)

    def budget(self, *, beside: bool = False, patient: bool = False) -> int:
        """Prompt tokens for the next step: 1 to `largest`.

        `beside`: other tasks decode and wait for the step; it has a chunk at most. `patient`: none does, and the step
        can be interrupted; it may take longer, and has at least a chunk unless that takes far too long.
        """
        per_token = min(seconds / n for n, seconds in self._recent)
        if beside:
            # a part of a chunk costs nearly as much as a whole one
            if per_token * self._chunk <= BESIDE * self._target_s:
                return self._chunk
            return self._within(self._target_s, per_token, self._chunk)
        if patient and per_token * self._chunk <= ALONE * self._target_s:
            return max(self._chunk, self._within(ALONE * self._target_s, per_token, self._largest))
        return self._within(self._target_s, per_token, self._largest)

    def _within(self, target_s: float, per_token: float, most: int) -> int:
        """Prompt tokens of a step of about `target_s` seconds."""
        if per_token * most <= target_s:
            return most
        n, seconds = self._recent[-1]
        # where reading the weights is most of a step, more tokens cost little more: try twice as many
        fits = max(int(target_s / per_token), 2 * n if seconds <= GROW_BELOW * target_s else 1)
        if fits >= most:
            return most
        if fits >= self._align:
            return fits // self._align * self._align
        # powers of two: equal prompts are cut alike while the speed stays about the same
        return 1 << (max(1, fits).bit_length() - 1)

    @property
    def max_step_s(self) -> float:
        """The longest step to expect, in seconds."""
        return max(self._target_s, self._longest_s)


class DecodeCost:
    """The seconds of a decode step by its number of rows, measured once for a model on a machine."""

    SIZES = (1, 2, 4, 8)
    WORTH = 0.9
    """Smaller steps in turns must take less than this share of the time of one step with all rows."""

    def __init__(self, step_cost: dict[int, float]) -> None:
        """`step_cost` has the milliseconds that are known."""
        self.seconds = {n: ms / 1000.0 for n, ms in step_cost.items()}

    def of(self, n: int) -> float:
        """Seconds of a step with n rows: between measured numbers by a straight line, beyond in proportion."""
        known = sorted(self.seconds)
        if n >= known[-1]:
            return self.seconds[known[-1]] * n / known[-1]
        above = next(size for size in known if size >= n)
        below = max(size for size in known if size <= n)
        if above == below:
            return self.seconds[n]
        part = (n - below) / (above - below)
        return self.seconds[below] * (1 - part) + self.seconds[above] * part

    def best_size(self, n: int) -> int:
        """Rows of the step that costs the least for each, of n that are waiting."""
        if len(self.seconds) < 2 or n < 2:
            return n
        best = min(
            (size for size in self.seconds if size < n), key=lambda size: self.seconds[size] / size, default=n
        )
        return best if self.of(best) / best < self.WORTH * self.of(n) / n else n

    @property
    def rides(self) -> bool:
        """Whether a decode row beside a prompt's chunk costs less than in a step of its own: weights are the cost."""
        return len(self.seconds) > 1 and self.of(8) < RIDES_BELOW * 8 * self.of(1)
