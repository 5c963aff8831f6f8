"""The prefill budget: about half a second by measured cost, on a device of any speed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai.engine.step_cost import STEP_S, DecodeCost, StepCost


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


def test_a_step_that_nobody_waits_for_is_long_and_one_beside_others_a_chunk() -> None:
    cost = StepCost(0.020, 512, 64, 64)
    assert (cost.budget(beside=True), cost.budget(), cost.budget(patient=True)) == (16, 16, 64)
    cost.add(64, 0.4)  # many tokens in one step cost less for each
    assert (cost.budget(beside=True), cost.budget(), cost.budget(patient=True)) == (64, 64, 320)


def test_a_chunk_beside_others_may_take_a_second() -> None:
    # half a chunk would cost nearly as much
    cost = StepCost(0.012, 512, 64, 64)
    assert (cost.budget(beside=True), cost.budget()) == (64, 32)


def test_a_very_slow_device_keeps_small_steps() -> None:
    cost = StepCost(0.5, 512, 64, 64)
    assert cost.budget(patient=True) == cost.budget() == cost.budget(beside=True) == 2
    fast = StepCost(0.001, 512, 64, 64)
    assert (fast.budget(beside=True), fast.budget(), fast.budget(patient=True)) == (64, 448, 512)


def test_decode_rows_are_batched_where_that_is_cheaper() -> None:
    q4 = DecodeCost({1: 8.0, 2: 14.3, 4: 22.2, 8: 37.6})
    assert [q4.best_size(n) for n in (1, 2, 3, 4, 8, 16)] == [1, 2, 3, 4, 8, 16]
    q8 = DecodeCost({1: 11.4, 2: 32.8, 4: 43.4, 8: 52.7})
    assert [q8.best_size(n) for n in (1, 2, 3, 4, 8, 16)] == [1, 1, 1, 4, 8, 16]
    assert not q8.rides
    assert not DecodeCost({1: 8.0}).rides
    assert DecodeCost({}).best_size(5) == 5
    # one row costs as much as eight: the weights come from memory
    large = DecodeCost({1: 100.0, 2: 105.0, 4: 110.0, 8: 130.0})
    assert large.rides
    assert large.best_size(3) == 3
    assert large.of(3) == pytest.approx(0.1075)
    assert large.of(16) == pytest.approx(0.26)
