"""Threads that evaluate the rows of a step side by side."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence

from tinyoai.engine.contract import Row


class _Step:
    """The rows of a step that no thread has taken, and the results of those that helpers have evaluated."""

    def __init__(self, rows: Sequence[Row], n_threads: int) -> None:
        self.n_threads = n_threads
        self.rows = deque(rows)
        self.done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()


class Crew:
    """Helper threads beside the calling thread, which works too. Threads start with the first step that needs them."""

    def __init__(self, n_helpers: int, evaluate: Callable[[Row, int], None]) -> None:
        self._evaluate = evaluate
        """Evaluates a row with a number of threads."""
        self._steps: queue.SimpleQueue[_Step | None] = queue.SimpleQueue()
        """A step comes once for each helper that is wanted in it."""
        self._threads = [threading.Thread(target=self._help, daemon=True) for _ in range(n_helpers)]
        self._started = False

    def evaluate(self, rows: Sequence[Row], n_threads: int, n_at_once: int) -> None:
        """Evaluates all rows, with n_threads each and at most n_at_once side by side.

        Raises the first error after all rows have ended.
        """
        n_helpers = max(0, min(len(self._threads), n_at_once - 1, len(rows) - 1))
        if n_helpers and not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        step = _Step(rows, n_threads)
        for _ in range(n_helpers):
            self._steps.put(step)
        errors: list[BaseException | None] = []
        self._work(step, errors.append)
        # a helper that wakes up too late finds no row, and nothing waits for it
        errors += [step.done.get() for _ in range(len(rows) - len(errors))]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """Ends the threads."""
        if self._started:
            for _ in self._threads:
                self._steps.put(None)

    def _work(self, step: _Step, report: Callable[[BaseException | None], None]) -> None:
        """Evaluates rows until none is left, and reports each row's error or None."""
        while True:
            try:
                row = step.rows.popleft()
            except IndexError:
                return
            try:
                self._evaluate(row, step.n_threads)
            except BaseException as error:
                report(error)
            else:
                report(None)

    def _help(self) -> None:
        while (step := self._steps.get()) is not None:
            self._work(step, step.done.put)
