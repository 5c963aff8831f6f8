"""The line before the slots: who waits, who is next, who has waited too long.

Owns the order: clients take turns, and each client's requests go first come, first served, so that one
that sends a hundred does not keep another waiting for all of them. Pure: the time is an argument. It
must not know engines, slots or what a request asks for.
"""

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What the line needs to know of who stands in it."""

    client: str
    """Who sent it: turns are between these."""
    group: str
    """The request it is a part of: a line of n_max requests may hold more parts than that."""
    give_up_at: float
    """When it has waited too long, in the clock's seconds."""


T = TypeVar("T", bound=Waiting)


class Line(Generic[T]):
    """At most n_max requests, from however many clients."""

    def __init__(self, n_max: int) -> None:
        self._n_max = n_max
        self._by_client: dict[str, deque[T]] = {}
        """In the order of their turns: who was served goes to the end."""
        self._groups: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def __iter__(self) -> Iterator[T]:
        for waiting in self._by_client.values():
            yield from waiting

    @property
    def n_requests(self) -> int:
        """Requests in the line, however many parts they have."""
        return len(self._groups)

    def push(self, item: T, n_free: int = 0) -> bool:
        """Whether there was room, n_free slots included. Parts of a request that is in the line always find room."""
        if item.group not in self._groups and len(self._groups) >= self._n_max + n_free:
            return False
        self._groups[item.group] = self._groups.get(item.group, 0) + 1
        self._by_client.setdefault(item.client, deque()).append(item)
        return True

    def first(self) -> T | None:
        """Whose turn it is."""
        for waiting in self._by_client.values():
            return waiting[0]
        return None

    def pop(self) -> T:
        """Takes the first out; its client's next turn comes after everyone else's. Raises IndexError."""
        if not self._by_client:
            raise IndexError("nobody waits")
        client = next(iter(self._by_client))
        waiting = self._by_client.pop(client)
        item = waiting.popleft()
        if waiting:
            self._by_client[client] = waiting
        self._forget(item)
        return item

    def remove(self, item: T) -> None:
        """Takes one out from wherever it stands. Raises ValueError if it stands nowhere."""
        waiting = self._by_client.get(item.client)
        if waiting is None:
            raise ValueError("it does not wait")
        waiting.remove(item)
        if not waiting:
            del self._by_client[item.client]
        self._forget(item)

    def expired(self, now: float) -> list[T]:
        """Takes out all that have waited too long."""
        late = [item for item in self if item.give_up_at <= now]
        for item in late:
            self.remove(item)
        return late

    def _forget(self, item: T) -> None:
        left = self._groups[item.group] - 1
        if left:
            self._groups[item.group] = left
        else:
            del self._groups[item.group]
