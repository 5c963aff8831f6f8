"""Groups of tasks by their LoRA adapters: a step evaluates the tasks of one group, and groups share time equally."""

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from tinyoai.engine.contract import Adapter
from tinyoai.engine.tasks import Task

TURN_S = 0.05
"""Seconds that a group may be ahead of another: a change of adapters takes llama.cpp some milliseconds."""


MAX_GROUPS = 64
"""Groups to remember: clients choose scales, so there may be any number."""


class HasTask(Protocol):
    """An entry of the running tasks."""

    @property
    def task(self) -> Task:
        """Its task."""


T = TypeVar("T", bound=HasTask)


class Group:
    """The state of one group. `served_s` is the time that it has had, in seconds from a common start."""

    __slots__ = ("debt", "served_s")

    def __init__(self, served_s: float) -> None:
        self.served_s = served_s
        self.debt = (0.0, 0)
        """Kept for the group while others run: time owed to its decodes, and its decode-only steps in a row."""


class AdapterGroups:
    """Chooses the group of each step: the current one, until it is a turn ahead of another."""

    def __init__(self) -> None:
        self.current = Group(0.0)
        self._groups: dict[tuple[Adapter, ...], Group] = {(): self.current}
        """Groups with tasks in the last step, and those that have left while they were ahead."""
        self._here: set[tuple[Adapter, ...]] = {()}
        """Groups with tasks in the last step."""

    def choose(self, running: Sequence[T]) -> Sequence[T]:
        """Returns the tasks of one group, in their order, and makes the group the current one."""
        here = dict.fromkeys(r.task.adapters for r in running)
        if not here or (len(here) == 1 and here.keys() == self._here == self._groups.keys()):
            return running
        self._meet(set(here))
        least = min(here, key=lambda adapters: self._groups[adapters].served_s)
        chosen = next((adapters for adapters in here if self._groups[adapters] is self.current), least)
        if self.current.served_s >= self._groups[least].served_s + TURN_S:
            chosen = least
        self.current = self._groups[chosen]
        return [r for r in running if r.task.adapters == chosen]

    def _meet(self, here: set[tuple[Adapter, ...]]) -> None:
        """Adds the groups that come in, level with the one that has had the least, and forgets others.

        A group that left ahead of the others and comes back is still ahead: short requests gain nothing.
        """
        stayed = [self._groups[adapters].served_s for adapters in here & self._here]
        begin = min(stayed, default=math.inf)
        self._groups = {
            adapters: group
            for adapters, group in self._groups.items()
            if adapters in here & self._here or group.served_s > begin
        }
        if len(self._groups) > MAX_GROUPS:
            self._groups = {adapters: self._groups[adapters] for adapters in here & self._here}
        for adapters in here:
            if adapters not in self._groups:
                self._groups[adapters] = Group(begin if stayed else 0.0)
        self._here = here

    def account(self, seconds: float) -> None:
        """Records the time of a step of the current group."""
        self.current.served_s += seconds
