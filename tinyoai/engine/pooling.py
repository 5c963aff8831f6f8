"""Token states to one embedding.

Owns the ways there are: "last" takes the state of the last token, "mean" the mean over all tokens, and
"weighted-mean" a mean in which the token at position i counts i times, since a causal model's later states
have seen more of the text (Muennighoff 2022, SGPT, section 3.1.1). The one door to numpy, which a worker
opens with its first embedding. It must not know where states come from or who asked.
"""

from typing import Any

import numpy as np

LAST = "last"


class NotFinite(ArithmeticError):
    """The states are no numbers that a length could be made of."""


class Pooling:
    """Adds up one text's states, in the order of its tokens."""

    def __init__(self, kind: str, n_embd: int, dimensions: int = 0) -> None:
        self._kind = kind
        self._dimensions = dimensions
        self._n_seen = 0
        self._sum = np.zeros(n_embd, np.float64)

    @property
    def wants_all(self) -> bool:
        """Every token's state counts, not the last one's alone."""
        return self._kind != LAST

    def add(self, state: Any) -> None:
        """The next token's state: a buffer of native float32, read before this returns."""
        values = np.frombuffer(state, np.float32)
        self._n_seen += 1
        if self._kind == "weighted-mean":
            self._sum += np.float64(self._n_seen) * values
        elif self._kind == "mean":
            self._sum += values
        else:
            self._sum[:] = values

    def unit(self) -> bytes:
        """The vector, or its first `dimensions` numbers, at length 1: little-endian float32.

        The length swallows what a mean would be divided by. A vector of zeros stays one. Raises NotFinite.
        """
        vector = self._sum[: self._dimensions or None]
        largest = np.abs(vector).max(initial=0.0)
        if not np.isfinite(largest):
            raise NotFinite
        if largest > 0.0:
            vector = vector / largest  # squares of very large or small numbers would leave the range
            vector = vector / np.sqrt(np.square(vector).sum())
        return vector.astype("<f4").tobytes()
