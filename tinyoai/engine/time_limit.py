"""Limits the time of Python code that may never end by itself.

After `soft_s` an exception ends the code. It cannot end a single call of a C function, so after `hard_s` the kernel
ends the process by SIGALRM.
"""

import contextlib
import ctypes
import queue
import signal
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TimedOut(Exception):
    """The code did not end in time."""


class _Stop(BaseException):
    """Raised inside the code. It is no Exception, so that the code's own handlers let it through."""


class TimeLimit:
    """Runs one function at a time. A thread of its own watches the clock."""

    def __init__(self, hard_s: float) -> None:
        self._hard_s = hard_s
        # locks and queues of Python code are of no use here: _Stop could leave them locked
        self._lock = threading.Lock()
        self._begun: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._deadline = 0.0
        """Of the running function, by the monotonic clock; 0: none runs, or its time was up."""
        self._thread_id = 0
        self._stopped = False
        """The running function's time was up."""
        self._watching = False

    def run(self, function: Callable[[], T], soft_s: float) -> T:
        """The function's value. Raises TimedOut after `soft_s`, and what the function raises.

        _Stop is raised once at most, and never after this method: `_end` takes back one that is still on its way.
        """
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._watch, daemon=True, name="time limit").start()
        error: Exception | None = None
        value: T
        try:
            self._begin(soft_s)
            try:
                value = function()
            except Exception as raised:
                error = raised
            stopped = self._end()
        except _Stop:
            stopped = True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if stopped:
            raise TimedOut(f"did not end within {soft_s:g} seconds") from None
        if error is not None:
            raise error
        return value

    def _begin(self, soft_s: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._hard_s)  # SIGALRM's default is to end the process
        with self._lock:
            self._thread_id = threading.get_ident()
            self._stopped = False
            self._deadline = time.monotonic() + soft_s
        self._begun.put(None)

    def _end(self) -> bool:
        """Ends the watch; returns whether the time was up."""
        with self._lock:
            self._deadline = 0.0
            if self._stopped:
                _raise_in(self._thread_id, None)
            return self._stopped

    def _watch(self) -> None:
        left: float | None = None
        while True:
            with contextlib.suppress(queue.Empty):
                self._begun.get(timeout=left)
            with self._lock:
                left = self._deadline - time.monotonic() if self._deadline else None
                if left is not None and left <= 0:
                    left, self._deadline, self._stopped = None, 0.0, True
                    _raise_in(self._thread_id, _Stop)


def _raise_in(thread_id: int, exception: type[BaseException] | None) -> None:
    """Raises an exception in a thread at its next Python instruction; None takes back one that is on its way."""
    value = None if exception is None else ctypes.py_object(exception)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), value)
