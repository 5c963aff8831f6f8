"""The Task protocol: a unit of work in one KV sequence, as the scheduler sees it.

A task knows its own progress: which row comes next, and the events that an evaluation brings. It knows nothing of
other tasks, slots or time limits of the queue.
"""

from typing import Any, NamedTuple, Protocol

from tinyoai import wire
from tinyoai.engine.contract import Adapter, Engine, Row


class TaskFailed(Exception):
    """The task ends in an error. `spoiled`: its sequence must not be reused."""

    def __init__(self, kind: str, message: str, *, param: str | None = None, spoiled: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.spoiled = spoiled


class Outputs(NamedTuple):
    """The outputs of a task's row, valid until the next eval."""

    engine: Engine
    row: int

    def logits(self, at: int = -1) -> Any:
        """Logits of the row's token `at`."""
        return self.engine.logits(self.row, at)

    def embedding(self) -> Any:
        """The row's embedding or hidden states."""
        return self.engine.embedding(self.row)

    def score(self) -> float:
        """The score of the row's sequence."""
        return self.engine.score(self.row)


class Task(Protocol):
    """One choice of a Generate, one Embed or one Rank."""

    ids: list[int]
    """The prompt."""
    n_expected: int
    """Tokens that its sequence is expected to hold at the end."""
    n_reusable: int
    """Leading prompt tokens that may come from a cache."""
    exact: bool
    """Reuse only what equals a fresh prefill bit for bit."""
    adapters: tuple[Adapter, ...]
    keeps_prefix: bool
    """Its sequence may be worth reusing afterwards."""
    n_resumable: int
    """Prompt tokens that other prompts of the conversation are likely to begin with; 0: not known."""
    checkpoint: int
    """Prompt tokens after which the sequence is saved, since it cannot be cut there later; 0: none."""
    cache_miss: int
    """See wire.Accepted. Set before `start`."""
    prefilling: bool
    """Its prompt is not evaluated yet."""
    ended: bool

    def start(self, seq: int, n_cached: int, now: float) -> list[wire.ToServer]:
        """Gets a sequence whose first n_cached tokens are in place; returns first events. Raises TaskFailed."""

    def move(self, seq: int) -> None:
        """Goes on in another sequence, which holds the same tokens."""

    def next_row(self, budget: int) -> Row | None:
        """The row to evaluate next, with at most `budget` prompt tokens; None: not with this budget."""

    def on_eval(self, n_tokens: int, outputs: Outputs, now: float) -> list[wire.ToServer]:
        """Takes the outputs of its last row, of which `n_tokens` were evaluated; returns events.

        Sets `ended` with the last event. Raises TaskFailed.
        """

    def cut_short(self, now: float) -> list[wire.ToServer]:
        """Ends it as it is, since its time is up; returns its last events."""
