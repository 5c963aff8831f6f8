"""The number of threads for a step, chosen from simulated step times."""

import pytest

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
