"""Batching: the tasks and rows of a step, and the time that prefill and decode have taken from each other."""

from collections.abc import Sequence
from typing import NamedTuple

from tinyoai.engine.adapter_groups import AdapterGroups
from tinyoai.engine.contract import Capabilities, Row, Want
from tinyoai.engine.requests import QueuedRequest
from tinyoai.engine.slots import Slot
from tinyoai.engine.step_cost import DecodeCost, StepCost
from tinyoai.engine.tasks import Task

DECODE_SHARE = 0.75
"""Seconds that decodes get after each second of a prompt's step beside them."""
MAX_STREAK = 64
"""Decode-only steps between two prefill steps at most, whatever the clock says."""


class Running:
    """A task in a slot. `started` is in seconds of the scheduler's clock."""

    __slots__ = ("request", "slot", "started", "task")

    def __init__(self, request: QueuedRequest, task: Task, slot: Slot, started: float) -> None:
        self.request = request
        self.task = task
        self.slot = slot
        self.started = started


class Batch(NamedTuple):
    """The tasks of a step, each with its row; `n_prefill` prompt tokens are in them."""

    tasks: list[Running]
    rows: list[Row]
    n_prefill: int


class Batching:
    """Chooses the tasks of each step.

    If some decode and some prefill, a step takes a chunk of one prompt, and all that decode where that costs less than
    steps of their own; or those that decode alone, as long as they are owed time. Decodes are owed a share of the time
    that prefill steps took, so a long prompt takes about half of their speed, and they take less than half of its.
    """

    def __init__(self, caps: Capabilities) -> None:
        self.cost = StepCost(caps.step_cost.get(1, 0.0) / 1000.0, caps.n_batch, caps.align, caps.n_chunk)
        self.decode_cost = DecodeCost(caps.step_cost)
        self._caps = caps
        self._groups = AdapterGroups()
        self._budget = 0
        """Prompt tokens that the last step with a prompt could have had."""
        self._decode_debt_s = 0.0
        self._decode_streak = 0
        self._turn = self._decode_turn = 0

    def select(self, running: Sequence[Running]) -> Batch:
        """The next step's batch; empty if no task can do anything."""
        running = self._one_group(running)
        if len(running) == 1 and not running[0].task.prefilling:  # one stream alone is the usual case
            self._decode_debt_s = 0.0
            return Batch(list(running), _decode_rows(running), 0)
        prefilling = [r for r in running if r.task.prefilling]
        decoding = [r for r in running if not r.task.prefilling] if prefilling else list(running)
        decode_only = bool(decoding) and (
            not prefilling or (self._decode_debt_s > 0.0 and self._decode_streak < MAX_STREAK)
        )
        if not (prefilling and decoding):
            self._decode_debt_s = 0.0
        if decode_only:
            tasks = self._cheapest(decoding)
            return Batch(tasks, _decode_rows(tasks), 0)
        if not prefilling:
            return Batch([], [], 0)
        return self._with_prefill(prefilling, decoding)

    def account(self, n_prefill: int, n_decode: int, seconds: float) -> None:
        """Records a step with these numbers of prompt tokens and of decode rows."""
        self._groups.account(seconds)
        if n_prefill:
            n = n_prefill + n_decode
            self.cost.add(n, seconds, typical=2 * n >= self._budget)
            self._decode_debt_s, self._decode_streak = DECODE_SHARE * seconds * n_prefill / n, 0
        else:
            self._decode_debt_s -= seconds
            self._decode_streak += 1

    def _one_group(self, running: Sequence[Running]) -> Sequence[Running]:
        """The tasks that share a step, which all have the same adapters. What is owed to decodes is kept by group."""
        before = self._groups.current
        running = self._groups.choose(running)
        if self._groups.current is not before:
            before.debt = self._decode_debt_s, self._decode_streak
            self._decode_debt_s, self._decode_streak = self._groups.current.debt
        return running

    def _with_prefill(self, prefilling: list[Running], decoding: list[Running]) -> Batch:
        """Prompt tokens within the budget, in turns, and the rows that ride.

        If others decode, the first prompt gets all that it can use, and further ones that end in this step the rest.
        """
        self._turn += 1
        caps, beside = self._caps, bool(decoding)
        budget = self.cost.budget(beside=beside, patient=caps.interrupts and not beside)
        budget = max(caps.n_least, min(budget, caps.n_batch))
        self._budget = budget
        at = self._turn % len(prefilling)
        prefilling = (prefilling[at:] + prefilling[:at])[:budget]
        tasks: list[Running] = []
        rows: list[Row] = []
        n_prefill = n_outputs = 0
        for i, each in enumerate(prefilling):
            part = budget if beside else budget // (len(prefilling) - i)
            row = each.task.next_row(max(caps.n_least, part)) if budget > 0 else None
            if row is None or (beside and rows and row.want is Want.NOTHING):
                continue
            outputs = _n_outputs(row)
            # a row that does not fit beside the others comes first in another step
            fits = len(row.tokens) + n_prefill <= caps.n_batch
            if rows and not (fits and n_outputs + outputs <= caps.n_outputs_total):
                continue
            tasks.append(each)
            rows.append(row)
            n_outputs += outputs
            n_prefill += len(row.tokens)
            budget -= len(row.tokens)
        if self._rides(n_prefill, decoding):
            n = min(len(decoding), caps.n_batch - n_prefill, caps.n_outputs_total - n_outputs)
            tasks += decoding[:n]
            rows += _decode_rows(decoding[:n])
        return Batch(tasks, rows, n_prefill)

    def _rides(self, n_prefill: int, decoding: list[Running]) -> bool:
        """Whether decode rows share the step of prompt tokens: where that is cheaper, or the step is small anyway."""
        if not self._caps.batches or self.decode_cost.rides:
            return True
        return n_prefill + len(decoding) < (self._caps.n_chunk or self._caps.n_row)

    def _cheapest(self, decoding: list[Running]) -> list[Running]:
        """The tasks of one decode step: all, or as few as cost the least time for each token, in turns."""
        size = self.decode_cost.best_size(len(decoding)) if self._caps.batches else len(decoding)
        if size == len(decoding):
            return decoding
        self._decode_turn += 1
        at = self._decode_turn * size % len(decoding)
        return (decoding[at:] + decoding[:at])[:size]


def _n_outputs(row: Row) -> int:
    """Tokens of a row that have outputs."""
    if row.want is Want.NOTHING:
        return 0
    return 1 if row.want is Want.LAST else len(row.tokens)


def _decode_rows(decoding: Sequence[Running]) -> list[Row]:
    return [row for running in decoding if (row := running.task.next_row(1)) is not None]
