"""Steps of one set of LoRA adapters each, and the time that sets get."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec import structs

from tests.engine.test_scheduler import ask, ends, finish, start, submit, text_of
from tinyoai import wire
from tinyoai.engine.adapter_groups import TURN_S, AdapterGroups
from tinyoai.engine.contract import Row
from tinyoai.engine.fake import FakeEngine
from tinyoai.engine.scheduler import Scheduler
from tinyoai.wire import Adapter

Set = tuple[Adapter, ...]
A: Set = (Adapter("a"),)
B: Set = (Adapter("b"),)


class Timed:
    """A scheduler over the scripted engine, with a clock on which a step takes as long as its set says."""

    def __init__(
        self, step_s: dict[Set, float], n_slots: int = 4, n_batch: int = 8, prefill_s: float = 0.0
    ) -> None:
        self.now = 0.0
        self.spent: Counter[Set] = Counter()
        """Seconds of each set."""
        self.order: list[Set] = []
        """The set of each step."""
        self.prefills: list[bool] = []
        """Whether a step had prompt tokens."""
        self.gaps: dict[Set, float] = defaultdict(float)
        """The longest time between two steps of a set."""
        self._last: dict[Set, float] = {}
        self.engine = FakeEngine(name="fake", n_slots=n_slots, n_ctx=4096, n_batch=n_batch, adapters=True)
        self.engine.info = structs.replace(self.engine.info, adapters=(Adapter("a", 0.0), Adapter("b", 0.0)))
        evaluate = self.engine.eval

        def timed(rows: Sequence[Row], until: float = 0.0) -> None:
            (adapters,) = {row.adapters for row in rows}  # one set in a step
            evaluate(rows, until)
            prefill = any(len(row.tokens) > 1 for row in rows)
            seconds = step_s[adapters] + prefill_s * prefill
            self.gaps[adapters] = max(self.gaps[adapters], self.now - self._last.get(adapters, self.now))
            self.now += seconds
            self._last[adapters] = self.now
            self.spent[adapters] += seconds
            self.order.append(adapters)
            self.prefills.append(prefill)

        self.engine.eval = timed  # type: ignore[method-assign]
        self.scheduler = Scheduler(self.engine, n_queue=64, clock=lambda: self.now)

    def submit(self, text: str, adapters: Set, **fields: Any) -> wire.Request:
        """Queues a request."""
        request = ask(text, adapters=adapters, **fields)
        assert not submit(self.scheduler, self.engine, request)
        return request

    def run(self, until: float) -> list[wire.ToServer]:
        """Steps up to a time and returns all events."""
        out: list[wire.ToServer] = []
        while self.now < until and not self.scheduler.idle:
            out += start(self.scheduler, self.engine)
            out += self.scheduler.step()
        return out


LONG = '!{"text": "x", "repeat": 3000}'


@pytest.mark.parametrize("slow", [0.001, 0.01, 0.04])
def test_two_sets_get_the_same_time_however_long_their_steps_are(slow: float) -> None:
    timed = Timed({A: slow, B: 0.002})
    for _ in range(3):  # three streams of one set do not get more than one of the other
        timed.submit(LONG, A)
    timed.submit(LONG, B)
    timed.run(4.0)
    assert abs(timed.spent[A] - timed.spent[B]) <= TURN_S + 2 * slow
    for adapters in (A, B):
        assert timed.gaps[adapters] <= 2 * TURN_S + 2 * slow + 0.005
    # a change of adapters takes time, so a set keeps its turn
    changes = sum(a != b for a, b in zip(timed.order, timed.order[1:], strict=False))
    assert changes <= 4.0 / TURN_S


def test_a_set_without_adapters_is_a_set() -> None:
    timed = Timed({A: 0.01, (): 0.01})
    timed.submit(LONG, A)
    timed.submit(LONG, ())
    timed.run(2.0)
    assert abs(timed.spent[A] - timed.spent[()]) <= TURN_S + 0.02


def test_answers_are_complete_beside_another_set() -> None:
    timed = Timed({A: 0.02, B: 0.01})
    asked = {timed.submit(f"message {i} " * 20, A if i % 2 else B).id: f"message {i} " * 20 for i in range(8)}
    events = finish(timed.scheduler)
    for number, text in asked.items():
        assert text_of(events, number) == text
    assert len(ends(events)) == 8


def test_short_requests_of_one_set_do_not_starve_a_stream_of_another() -> None:
    # each begins with a prompt that takes longer than a turn, and ends at once
    timed = Timed({A: 0.1, B: 0.005}, n_slots=2, n_batch=64)
    timed.submit(LONG, B)
    while timed.now < 10.0:
        timed.run(timed.now + 0.001)
        if all(running.task.adapters == B for running in timed.scheduler._running):
            timed.run(timed.now + 0.001)  # for a step there is nothing of the one set
            timed.submit("x" * 7, A, max_tokens=1)
    assert 0.8 < timed.spent[A] / timed.spent[B] < 1.25


def test_the_prefix_of_another_set_is_not_reused() -> None:
    timed = Timed({A: 0.01, B: 0.01, (): 0.01})
    cached = []
    for adapters in (A, B, (), A, B, ()):
        timed.submit("a prompt that is long enough to be kept", adapters)
        events = finish(timed.scheduler)
        cached += [event.n_cached for event in events if isinstance(event, wire.Accepted)]
    assert cached[:3] == [0, 0, 0]
    assert all(n > 30 for n in cached[3:])


def test_time_owed_to_decodes_is_kept_for_each_set() -> None:
    # a prompt's step is longer than a turn, so that the other set follows at once
    timed = Timed({A: 0.005, B: 0.005}, prefill_s=0.1)
    for adapters in (A, B):
        timed.submit(LONG, adapters)
    timed.run(1.0)
    for adapters in (A, B):
        timed.submit("y" * 400, adapters)
    begin = len(timed.order)
    timed.run(timed.now + 5.0)
    n_prefills, n_decodes = sum(timed.prefills[begin:]), len(timed.order) - begin
    assert 0.4 < n_prefills * 0.1 / (n_prefills * 0.1 + n_decodes * 0.005) < 0.6


def test_choosing_is_free_of_state_when_all_are_alike() -> None:
    groups, running = AdapterGroups(), [Slotted(A), Slotted(A)]
    assert groups.choose(running) == running
    groups.account(5.0)
    # who comes in later owes nothing for the time before
    both = [*running, Slotted(B)]
    assert groups.choose(both) == running
    groups.account(TURN_S)
    assert groups.choose(both) == both[2:]
    assert groups.choose([]) == []


class Slotted:
    """An entry of the running tasks."""

    def __init__(self, adapters: Set) -> None:
        self.task: Any = type("Task", (), {"adapters": adapters})()
