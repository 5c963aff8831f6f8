"""The prefill budget: about half a second by measured cost, on a device of any speed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai.engine.step_cost import STEP_S, StepCost


def settle(cost: StepCost, seconds_of: "callable", steps: int = 30) -> list[float]:  # type: ignore[valid-type]
    """Runs prefill steps at the budget and returns how long each took."""
    took = []
    for _ in range(steps):
        n = cost.budget()
        took.append(seconds_of(n))  # type: ignore[misc]
        cost.add(n, took[-1])
    return took


def test_a_fast_model_gets_the_whole_batch_at_once() -> None:
    assert StepCost(0.0002, 512, 32).budget() == 512
    assert StepCost(0.0, 128, 32).budget() == 128


@pytest.mark.parametrize("one_token_s", [0.5, 0.1, 0.02, 0.004])
def test_a_step_takes_about_half_a_second(one_token_s: float) -> None:
    cost = StepCost(one_token_s, 512, 32)
    took = settle(cost, lambda n: n * one_token_s)
    assert max(took) <= max(STEP_S, 2 * one_token_s) + 1e-9
    assert took[-1] >= min(STEP_S, 512 * one_token_s) / 2


def test_a_memory_bound_model_is_not_cut_to_single_tokens() -> None:
    # a step costs as much as reading the weights, and little more for each token
    cost = StepCost(0.5, 512, 32)
    took = settle(cost, lambda n: 0.5 + 0.01 * n)
    assert max(took) <= 1.01
    assert cost.budget() >= 16


def test_one_hiccup_changes_nothing() -> None:
    cost = StepCost(0.001, 64, 32)
    for seconds in (0.03, 0.03, 5.0):
        cost.add(64, seconds)
    assert cost.budget() == 64
    assert cost.max_step_s >= 5.0


@given(st.lists(st.tuples(st.integers(1, 600), st.floats(0, 1000)), max_size=20), st.floats(0, 100))
def test_there_is_always_a_budget(steps: list[tuple[int, float]], one_token_s: float) -> None:
    cost = StepCost(one_token_s, 512, 32)
    for n, seconds in steps:
        cost.add(n, seconds)
    assert 1 <= cost.budget() <= 512
    assert cost.budget() < 32 or cost.budget() % 32 == 0
    assert cost.max_step_s > 0


def test_a_step_that_nobody_waits_for_has_the_fastest_size() -> None:
    cost = StepCost(0.020, 68, 64)
    assert cost.budget() == 16
    assert cost.budget(alone=True) == 64
    cost.add(64, 1.2)
    assert (cost.budget(), cost.budget(alone=True)) == (16, 64)


def test_a_very_slow_device_keeps_small_steps() -> None:
    cost = StepCost(0.5, 68, 64)
    assert cost.budget(alone=True) == cost.budget() == 2
    fast = StepCost(0.001, 512, 64)
    assert fast.budget(alone=True) == fast.budget() == 448
