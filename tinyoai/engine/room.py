"""Room in the KV cache: whether a task may start, and which tasks pause while the cells are short.

Only an engine whose slots share their cells can run out of them: there are fewer cells than the slots' context
windows have tokens.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from tinyoai.engine.batching import Running
from tinyoai.engine.contract import Capabilities
from tinyoai.engine.prefix_reuse import Assignment
from tinyoai.engine.sequences import Sequences
from tinyoai.engine.tasks import Task

RESUME_CELLS = 64
"""Free cells that a paused task needs beside its own, so that it is not paused again at once."""


class Paused(NamedTuple):
    """A task that has no slot until there is room again. `state` is that of its sequence of `tokens`."""

    running: Running
    tokens: list[int]
    state: bytes
    conversation: int
    n_resumable: int


class Room:
    """Counts cells for the tasks of a scheduler. `running` is its list of tasks with a slot, which changes here too."""

    def __init__(self, sequences: Sequences, caps: Capabilities, running: list[Running]) -> None:
        self.paused: deque[Paused] = deque()
        """In the order in which they get a slot again."""
        self._sequences = sequences
        self._running = running
        self._short = caps.shares_cells and caps.n_kv < caps.n_seq * caps.n_ctx
        """The cells can run out."""
        self._saves = caps.saves
        self._waiting: tuple[Task, int] | None = None
        """The last task that did not fit, and the cells that were there for it."""

    def waits(self, task: Task) -> bool:
        """Whether a task cannot start, without a look at what it shares: others are paused, or nothing has changed."""
        if self.paused:
            return True
        if self._waiting is None or self._waiting[0] is not task or not self._running:
            return False
        if any(running.task.prefilling for running in self._running):
            return False  # what it shares with their prompts may have grown
        return self._n_available() <= self._waiting[1]

    def fits(self, task: Task, assignment: Assignment) -> bool:
        """Whether the cells suffice for a task and all that run, by what they expect to take. One alone always fits."""
        self._waiting = None
        if not self._short or not self._running:
            return True
        shared = assignment.source or assignment.slot
        need = task.n_expected - (assignment.n_keep if shared.busy else 0)
        available = self._n_available()
        if need > available:
            self._waiting = task, available
        return need <= available

    def make(self, n: int) -> bool:
        """Evicts idle sequences until n cells are free. False: a running task has to pause first."""
        if not self._short:
            return True
        return self._sequences.free(n) or len(self._running) < 2 or not self._saves

    def pause_newest(self) -> None:
        """Takes the slot of the task that started last, and keeps its sequence in memory."""
        running = max(self._running, key=lambda running: running.started)
        slot = running.slot
        state = self._sequences.save(slot) if slot.tokens else b""
        self.paused.appendleft(Paused(running, slot.tokens[:], state, slot.conversation, slot.n_resumable))
        self._running.remove(running)
        slot.busy = False
        self._sequences.cut(slot, 0)

    def resume(self) -> tuple[Running, bool] | None:
        """Gives a slot to the first paused task; None if there is no room for it, or none is paused.

        Returns the task, and whether its sequence is restored.
        """
        free = [slot for slot in self._sequences.slots if not slot.busy]
        if not self.paused or not free:
            return None
        running, tokens, state, conversation, n_resumable = self.paused[0]
        need = max(len(tokens) + RESUME_CELLS, running.task.n_expected)
        if self._running and need > self._n_available():
            return None
        self.paused.popleft()
        slot = min(free, key=lambda slot: (bool(slot.tokens), slot.last_used))
        self._sequences.evict(slot)
        self._sequences.free(len(tokens))
        restored = not tokens or self._sequences.load(slot, tokens, state)
        running.task.move(slot.index)
        slot.last_used, slot.scope = running.slot.last_used, running.request.request.scope
        slot.conversation, slot.n_resumable = conversation, n_resumable
        running.slot = slot
        slot.adapters, slot.busy = running.task.adapters, True
        self._running.append(running)
        return running, restored

    def forget(self, running: Running) -> bool:
        """Drops a paused task; False if it is not paused."""
        kept = [paused for paused in self.paused if paused.running is not running]
        found = len(kept) < len(self.paused)
        self.paused = deque(kept)
        return found

    def _n_available(self) -> int:
        """Cells that no running task holds or is expected to take."""
        sequences = self._sequences
        return sequences.n_free + sequences.n_idle - _expected(self._running)


def _expected(running: Sequence[Running]) -> int:
    """Cells that these tasks are expected to take yet."""
    return sum(max(0, each.task.n_expected - len(each.slot.tokens)) for each in running)
