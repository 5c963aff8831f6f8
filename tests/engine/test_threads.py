"""The number of threads for a step, chosen from simulated step times."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai.engine import threads


class Steps:
    """A clock, and steps that advance it."""

    def __init__(self, seconds: dict[int, list[float]]) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.used: list[int] = []

    def step(self, n_threads: int) -> None:
        """Advances the clock by the next time for this number of threads. The last time repeats."""
        self.used.append(n_threads)
        times = self.seconds[n_threads]
        self.now += times.pop(0) if len(times) > 1 else times[0]

    def measure(self, n_threads: int = 0) -> tuple[int, float]:
        """Calls threads.measure with these steps."""
        chosen, seconds = threads.measure(self.step, n_threads, lambda: self.now)
        return chosen, round(seconds, 6)


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes seven cores available to a step; the eighth is the server's."""
    monkeypatch.setattr(threads, "available", lambda: 8)


def test_many_threads_are_used_if_they_are_faster() -> None:
    # the first step with many threads starts them and does not count
    assert Steps({1: [0.01], 7: [9.0, 0.005, 0.004, 0.006]}).measure() == (7, 0.004)
    assert Steps({1: [0.02, 0.01], 7: [0.001, 0.03]}).measure() == (1, 0.01)
    assert Steps({1: [0.01], 7: [0.01]}).measure() == (1, 0.01)


def test_a_stated_number_is_only_measured() -> None:
    steps = Steps({3: [5.0, 0.2, 0.1]})
    assert steps.measure(3) == (3, 0.1)
    assert set(steps.used) == {3}


@pytest.mark.parametrize("cores", [1, 2])
def test_one_core_is_left_to_the_server(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(threads, "available", lambda: cores)
    steps = Steps({1: [0.01]})
    assert steps.measure() == (1, 0.01)
    assert set(steps.used) == {1}


def test_a_slow_model_is_not_measured_for_long() -> None:
    steps = Steps({1: [2.0], 7: [1.0]})
    assert steps.measure() == (7, 1.0)
    assert len(steps.used) == 3


# -- all threads, or one -------------------------------------------------------------------------------


class ChosenSteps:
    """ChosenSteps of a ThreadChoice with a clock of its own. Times are in seconds for each token."""

    def __init__(self, most: int = 4, single_s: float = 0.010) -> None:
        self.now = 0.0
        self.choice = threads.ThreadChoice(most, single_s, lambda: self.now)

    def step(self, all_threads: float, one_thread: float, n_tokens: int = 1) -> int:
        """Takes a step, which costs what its number of threads says; returns that number."""
        n = self.choice.n
        seconds = n_tokens * (one_thread if n == 1 else all_threads)
        self.now += seconds
        self.choice.note(n_tokens, seconds)
        return n


def test_all_threads_are_used_while_they_cost_less() -> None:
    steps = ChosenSteps()
    assert {steps.step(0.004, 0.010) for _ in range(50)} == {4}
    assert {steps.step(0.001, 0.002, 64) for _ in range(50)} == {4}


def test_one_core_has_no_choice() -> None:
    steps = ChosenSteps(most=1)
    assert {steps.step(1.0, 1.0) for _ in range(50)} == {1}
    assert steps.choice.limit_s(1) == math.inf


def test_one_slow_step_is_a_hiccup_and_two_are_not() -> None:
    steps = ChosenSteps()
    steps.step(0.004, 0.010)
    assert [steps.step(cost, 0.010) for cost in (0.5, 0.004, 0.5, 0.5, 0.004)] == [4, 4, 4, 4, 1]


def test_the_first_step_is_a_trial() -> None:
    steps = ChosenSteps()
    assert [steps.step(0.5, 0.010) for _ in range(2)] == [4, 1]


def test_all_threads_are_tried_again_ever_less_often() -> None:
    steps = ChosenSteps()
    trials: list[float] = []
    while steps.now < 300:
        begin = steps.now
        if steps.step(0.5, 0.010) == 4:
            trials.append(begin)
    pauses = [after - before for before, after in itertools.pairwise(trials)]
    assert pauses[0] < 2.5
    assert max(pauses) == pytest.approx(60, abs=1)
    assert all(later > 0.9 * earlier for earlier, later in itertools.pairwise(pauses))


def test_the_cores_come_back() -> None:
    steps = ChosenSteps()
    for _ in range(20):
        steps.step(0.5, 0.010)
    assert steps.choice.n == 1
    for _ in range(1000):
        steps.step(0.004, 0.010)
    assert steps.choice.n == 4
    # and the next trouble is found as fast as the first
    assert [steps.step(0.5, 0.010) for _ in range(3)] == [4, 4, 1]


def test_a_step_may_last_twice_as_long_as_on_one_thread() -> None:
    steps = ChosenSteps(single_s=0.010)
    assert steps.choice.limit_s(1) == pytest.approx(0.020 + threads.ThreadChoice.SPARE_S)
    assert steps.choice.limit_s(64) == pytest.approx(1.280 + threads.ThreadChoice.SPARE_S)
    steps.choice.give_up()
    assert steps.choice.n == 1
    assert steps.choice.limit_s(64) == math.inf
    steps.step(0.5, 0.002, 64)
    while steps.choice.n == 1:
        steps.step(0.5, 0.010)
    # each kind of step has its own cost
    assert steps.choice.limit_s(64) == pytest.approx(0.256 + threads.ThreadChoice.SPARE_S)


def test_what_is_allowed_changes_the_next_step() -> None:
    steps = ChosenSteps()
    assert [steps.step(0.004, 0.010) for _ in range(3)] == [4, 4, 4]
    steps.choice.allow(2)
    assert [steps.step(0.004, 0.010) for _ in range(3)] == [2, 2, 2]
    steps.choice.allow(1)
    assert steps.choice.limit_s(1) == math.inf
    assert {steps.step(0.004, 0.010) for _ in range(10_000)} == {1}
    assert steps.now > 60
    steps.choice.allow(99)
    assert [steps.step(0.004, 0.010) for _ in range(3)] == [4, 4, 4]


def test_a_new_limit_ends_no_pause() -> None:
    steps = ChosenSteps()
    assert [steps.step(0.5, 0.010) for _ in range(2)] == [4, 1]
    for n in (2, 1, 3, 4):
        steps.choice.allow(n)
        assert steps.step(0.5, 0.010) == 1
    steps.choice.allow(3)
    while steps.choice.n == 1:
        steps.step(0.5, 0.010)
    assert 0.9 < steps.now < 2.5
    assert steps.choice.n == 3


def test_the_cost_on_one_thread_is_known_after_a_limit() -> None:
    steps = ChosenSteps(single_s=0.010)
    steps.choice.allow(1)
    for _ in range(5):
        steps.step(0.1, 0.030)
    steps.choice.allow(4)
    # 20 ms are slower than the 10 ms at load, and faster than one thread is now
    assert [steps.step(0.020, 0.030) for _ in range(10)] == [4] * 10


@given(st.lists(st.tuples(st.floats(1e-4, 10), st.floats(1e-4, 10), st.integers(1, 64)), max_size=200))
def test_the_number_is_always_one_of_two(costs: list[tuple[float, float, int]]) -> None:
    steps = ChosenSteps()
    for cost in costs:
        assert steps.step(*cost) in (1, 4)
        assert steps.choice.limit_s(64) > 0
