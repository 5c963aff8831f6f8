"""The cores of the machine, shared by the workers that have work.

Threads of a step spin while they wait for each other, so two workers that use all cores at once make each other many
times slower. The server gives each busy worker its part of the cores, and tells it when that part changes.
"""

from collections.abc import Iterable
from typing import Protocol

LINGER_S = 0.1
"""A worker counts as busy for so many seconds after its last request: a client that sends one request after the other
would otherwise change the threads of all workers with each."""


class Sharer(Protocol):
    """A worker that shares the cores."""

    @property
    def most_threads(self) -> int:
        """Threads that it may use at most; 0: any number."""

    def grant(self, n: int) -> None:
        """Lets it use n threads."""


def share(n_cores: int, n_busy: int, most: int = 0) -> int:
    """Threads for each of `n_busy` workers, at least 1; `most`, unless it is 0, is the limit.

    A worker that is alone gets `most` even if that is more than the machine has: a user has asked for it.
    """
    if n_busy < 2:
        return most or n_cores
    equal = max(1, n_cores // n_busy)
    return min(most, equal) if most else equal


def grant_all(busy: Iterable[Sharer], n_cores: int) -> None:
    """Gives each busy worker its part of the cores."""
    sharers = list(busy)
    for sharer in sharers:
        sharer.grant(share(n_cores, len(sharers), sharer.most_threads))
