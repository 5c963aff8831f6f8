"""The cost of a step: how many prompt tokens to evaluate at once.

A step is cut to about STEP_S seconds by measured cost, never below one token, so that a cancel, another stream and
the server's watchdog never wait long, however slow the device.
"""

from collections import deque

STEP_S = 0.5
"""Seconds that a prefill step should take at most."""
ALONE = 4.0
"""A step that nobody waits for, and that can be interrupted, may take this many times as long."""
GROW_BELOW = 0.6
"""A step that took less than this share of its time may be followed by one twice as large."""
RECENT = 3
"""Measured steps that count. The cheapest does: one hiccup of the machine must not change how prompts are cut."""


class StepCost:
    """Learns from every prefill step. `one_token_s` is the warm-up's time for one token."""

    def __init__(self, one_token_s: float, largest: int, align: int) -> None:
        """`largest` is the most tokens of one step; cuts at multiples of `align` keep results bit-exact."""
        self._target_s = max(STEP_S, 2 * one_token_s)
        self._largest = largest
        self._align = align
        self._recent: deque[tuple[int, float]] = deque([(1, one_token_s)], maxlen=RECENT)
        self._longest_s = one_token_s

    def add(self, n_tokens: int, seconds: float) -> None:
        """Records a prefill step."""
        self._recent.append((n_tokens, seconds))
        self._longest_s = max(seconds, 0.9 * self._longest_s)

    def budget(self, *, alone: bool = False) -> int:
        """Prompt tokens for the next step: 1 to `largest`.

        `alone`: no task decodes, and the step can be interrupted. Then it has at least `align` tokens, the number that
        the engine computes fastest, unless they take far too long.
        """
        per_token = min(seconds / n for n, seconds in self._recent)
        if alone and per_token * self._align <= ALONE * self._target_s:
            return max(self._align, self._shared(per_token))
        return self._shared(per_token)

    def _shared(self, per_token: float) -> int:
        """Prompt tokens of a step of about STEP_S."""
        if per_token * self._largest <= self._target_s:
            return self._largest
        n, seconds = self._recent[-1]
        # where reading the weights is most of a step, more tokens cost little more: try twice as many
        fits = max(int(self._target_s / per_token), 2 * n if seconds <= GROW_BELOW * self._target_s else 1)
        if fits >= self._largest:
            return self._largest
        if fits >= self._align:
            return fits // self._align * self._align
        # powers of two: equal prompts are cut alike while the speed stays about the same
        return 1 << (max(1, fits).bit_length() - 1)

    @property
    def max_step_s(self) -> float:
        """The longest step to expect, in seconds."""
        return max(self._target_s, self._longest_s)
