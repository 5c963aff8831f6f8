"""The queue for slots: fair across clients, bounded in requests, with deadlines.

Clients take turns; each client's requests are served first come, first served, so one client that sends a hundred
does not delay the others by all of them. Pure: times are arguments.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """A queued item."""

    client: str
    """Turns are between these."""
    group: str
    """The HTTP request that the item is a part of. The bound counts groups, not parts."""
    queue_deadline: float
    """Seconds of the caller's clock, after which the item expires."""


T = TypeVar("T", bound=Waiting)


class FairQueue(Generic[T]):
    """At most `n_max` groups of any number of clients."""

    def __init__(self, n_max: int) -> None:
        self._n_max = n_max
        self._by_client: dict[str, deque[T]] = {}
        """In the order of turns: the client that was served last comes last."""
        self._groups: dict[str, int] = {}
        self._expiry: list[tuple[float, int, T]] = []
        """A heap. Items that left the queue stay in it until they come up."""
        self._queued: set[int] = set()
        self._serial = count()

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, item: T) -> bool:
        return id(item) in self._queued

    def __iter__(self) -> Iterator[T]:
        """All items, client by client in the order of turns."""
        for items in self._by_client.values():
            yield from items

    @property
    def n_requests(self) -> int:
        """Groups in the queue."""
        return len(self._groups)

    def push(self, item: T, n_free: int = 0) -> bool:
        """Adds an item; False if the queue is full. `n_free` slots are room; parts of a queued group always fit."""
        if item.group not in self._groups and len(self._groups) >= self._n_max + n_free:
            return False
        self._by_client.setdefault(item.client, deque()).append(item)
        self._enter(item)
        return True

    def push_front(self, item: T) -> None:
        """Puts a popped item back as its client's first; the client's turn stays last."""
        self._by_client.setdefault(item.client, deque()).appendleft(item)
        self._enter(item)

    def first(self, ready: Callable[[T], bool] = lambda item: True) -> T | None:
        """The first item of the first client, in the order of turns, whose first item is ready."""
        return next((items[0] for items in self._by_client.values() if ready(items[0])), None)

    def pop(self, item: T) -> None:
        """Takes out an item; its client's next turn comes after everyone else's. Raises ValueError if not queued."""
        items = self._by_client.pop(item.client, None)
        if items is None:
            raise ValueError("the item is not queued")
        try:
            items.remove(item)
        finally:
            if items:
                self._by_client[item.client] = items
        self._leave(item)

    def remove(self, item: T) -> None:
        """Takes out an item without a change of turns. Raises ValueError if it is not queued."""
        items = self._by_client.get(item.client)
        if items is None:
            raise ValueError("the item is not queued")
        items.remove(item)
        if not items:
            del self._by_client[item.client]
        self._leave(item)

    def expired(self, now: float) -> list[T]:
        """Takes out all items whose deadline has passed. O(1) while none has."""
        late = []
        while self._expiry and (self._expiry[0][0] <= now or id(self._expiry[0][2]) not in self._queued):
            deadline, _, item = heapq.heappop(self._expiry)
            if id(item) in self._queued and item.queue_deadline <= now:
                self.remove(item)
                late.append(item)
            elif id(item) in self._queued and item.queue_deadline != deadline:
                heapq.heappush(self._expiry, (item.queue_deadline, next(self._serial), item))
        return late

    def _enter(self, item: T) -> None:
        self._groups[item.group] = self._groups.get(item.group, 0) + 1
        self._queued.add(id(item))
        heapq.heappush(self._expiry, (item.queue_deadline, next(self._serial), item))

    def _leave(self, item: T) -> None:
        self._queued.discard(id(item))
        left = self._groups[item.group] - 1
        if left:
            self._groups[item.group] = left
        else:
            del self._groups[item.group]
