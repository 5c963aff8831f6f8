"""Threads that evaluate the rows of a step side by side."""

import queue
import threading
from collections.abc import Callable, Sequence

from tinyoai.engine.contract import Row


class Crew:
    """Helper threads beside the calling thread, which works too. Threads start with the first step that needs them."""

    def __init__(self, n_helpers: int, evaluate: Callable[[Row, int], None]) -> None:
        self._evaluate = evaluate
        """Evaluates a row with a number of threads."""
        self._todo: queue.SimpleQueue[tuple[Row, int] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._help, daemon=True) for _ in range(n_helpers)]
        self._started = False

    def evaluate(self, rows: Sequence[Row], n_threads: int) -> None:
        """Evaluates all rows, with n_threads each. Raises the first error after all rows have ended."""
        if not self._threads:
            for row in rows:
                self._evaluate(row, n_threads)
            return
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        for row in rows:
            self._todo.put((row, n_threads))
        n_elsewhere, error = len(rows), None
        while True:
            try:
                item = self._todo.get_nowait()
            except queue.Empty:
                break
            if item is not None:
                n_elsewhere -= 1
                try:
                    self._evaluate(*item)
                except BaseException as caught:
                    error = error or caught
        for _ in range(n_elsewhere):
            error = self._done.get() or error
        if error is not None:
            raise error

    def close(self) -> None:
        """Ends the threads."""
        if self._started:
            for _ in self._threads:
                self._todo.put(None)

    def _help(self) -> None:
        while (item := self._todo.get()) is not None:
            try:
                self._evaluate(*item)
            except BaseException as error:
                self._done.put(error)
            else:
                self._done.put(None)
