"""Pooling: token states to one embedding.

"last" takes the state of the last token, "cls" that of the first, "mean" the mean over all tokens, and
"weighted-mean" a mean in which the token at position i counts i times, since a causal model's later states have seen
more of the text (Muennighoff 2022, SGPT, section 3.1.1). The only module of a worker that imports numpy, with the
first embedding.
"""

from typing import Any

import numpy as np

LAST = "last"


class NotFinite(ArithmeticError):
    """The states hold a NaN or an infinity."""


class Pooling:
    """Adds up the states of one text, in the order of its tokens."""

    def __init__(self, kind: str, n_embd: int, dimensions: int = 0) -> None:
        self._kind = kind
        self._n_embd = n_embd
        self._dimensions = dimensions
        self._n_seen = 0
        self._sum = np.zeros(n_embd, np.float64)

    def add(self, states: Any) -> None:
        """The next tokens' states: a buffer of float32, n_embd for each token, read before this returns."""
        for values in np.frombuffer(states, np.float32).reshape(-1, self._n_embd):
            self._n_seen += 1
            if self._kind == "weighted-mean":
                self._sum += np.float64(self._n_seen) * values
            elif self._kind == "mean":
                self._sum += values
            elif self._kind == "cls" and self._n_seen > 1:
                continue
            else:
                self._sum[:] = values

    def unit(self) -> bytes:
        """The vector, or its first `dimensions` numbers, scaled to length 1, as little-endian float32.

        Scaling makes a division by the number of tokens unnecessary. A vector of zeros stays one. Raises NotFinite.
        """
        vector = self._sum[: self._dimensions or None]
        largest = np.abs(vector).max(initial=0.0)
        if not np.isfinite(largest):
            raise NotFinite
        if largest > 0.0:
            vector = vector / largest  # squares of very large or small numbers would leave the range
            vector = vector / np.sqrt(np.square(vector).sum())
        return vector.astype("<f4").tobytes()
