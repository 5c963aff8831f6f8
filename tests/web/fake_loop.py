"""Event loops on a virtual clock: sockets are real, but a timer is due as soon as nothing else can happen.

`time()` advances only when every ready callback has run and no socket has an event. It then jumps to the next
timer. A test can wait an hour in a millisecond, and its result does not depend on the machine's speed.
"""

import asyncio
import contextvars
import heapq
import itertools
import os
import select
import selectors
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

START = 1000.0
GRACE_S = 0.002
"""Real seconds without any socket event before the clock moves: the kernel may still deliver packets."""


class _VirtualSelector(selectors.EpollSelector):
    """Moves the loop's clock instead of waiting for a timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        events = super().select(GRACE_S)
        if not events:
            self.now += timeout
        return events


class FakeAsyncioLoop(asyncio.SelectorEventLoop):
    """asyncio's loop on a virtual clock."""

    def __init__(self) -> None:
        self._virtual = _VirtualSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Returns the virtual time."""
        return self._virtual.now


class FakeUvloop(uvloop.Loop):  # type: ignore[misc]
    """uvloop on a virtual clock.

    libuv's timers cannot be moved, so this loop has its own timers. While one is pending, a real timer checks every
    millisecond whether the loop's epoll has events and whether callbacks were scheduled.
    """

    _epoll: int

    def __new__(cls) -> "FakeUvloop":
        """Creates the loop and finds the epoll that it opens."""
        before = _epolls()
        made: FakeUvloop = super().__new__(cls)
        (made._epoll,) = _epolls() - before
        return made

    def __init__(self) -> None:
        super().__init__()
        self._poll = select.poll()
        self._poll.register(self._epoll, select.POLLIN)
        self._now = START
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = itertools.count()
        self._n_quiet = 0
        self._ticking = False

    def time(self) -> float:
        """Returns the virtual time."""
        return self._now

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Schedules a callback. The clock does not advance before it has run."""
        self._n_quiet = 0
        handle: asyncio.Handle = super().call_soon(callback, *args, context=context)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Adds a timer on the virtual clock."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Adds a timer on the virtual clock."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._order), handle))
        self._tick_later()
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """asyncio's handles call this. The heap drops a cancelled timer once it is due."""

    def _tick_later(self) -> None:
        if not self._ticking:
            self._ticking = True
            super().call_later(GRACE_S / 2, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        if not self._timers:
            return
        self._n_quiet = 0 if self._poll.poll(0) else self._n_quiet + 1
        if self._n_quiet > 2:
            self._now = max(self._now, self._timers[0][0])
            while self._timers and self._timers[0][0] <= self._now:
                _, _, handle = heapq.heappop(self._timers)
                if not handle.cancelled():
                    handle._run()
            self._n_quiet = 0
        self._tick_later()


def _epolls() -> set[int]:
    """Returns the file descriptors of this process that are epolls."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            if "eventpoll" in str(Path(f"/proc/self/fd/{fd}").readlink()):
                found.add(int(fd))
        except OSError:
            continue
    return found
