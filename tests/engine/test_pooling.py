"""Pooling of token states: each method, the length, and values that are not finite."""

import math
import struct
from array import array

import pytest

from tinyoai.engine.pooling import NotFinite, Pooling

STATES = [[3.0, 0.0, 4.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0]]


def unit(kind: str, states: list[list[float]], dimensions: int = 0) -> list[float]:
    """Returns the pooled vector of these states."""
    pooling = Pooling(kind, len(states[0]), dimensions)
    for state in states:
        pooling.add(array("f", state))
    raw = pooling.unit()
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def normed(values: list[float]) -> list[float]:
    """Returns the vector scaled to length 1, computed in plain Python."""
    length = math.sqrt(sum(value * value for value in values))
    return [value / length for value in values]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("last", [0, 0, 2]), ("cls", [3, 0, 4]), ("mean", [3, 1, 6]), ("weighted-mean", [3, 2, 10])],
)
def test_each_method(kind: str, expected: list[float]) -> None:
    assert unit(kind, STATES) == pytest.approx(normed(expected), rel=1e-6)


def test_dimensions_truncates_and_rescales_to_length_one() -> None:
    assert unit("mean", STATES, 2) == pytest.approx(normed([3, 1]), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e20, 3e37])
def test_the_length_is_one_for_states_of_any_size(scale: float) -> None:
    found = unit("weighted-mean", [[value * scale for value in state] for state in STATES])
    assert math.hypot(*found) == pytest.approx(1.0, rel=1e-6)


def test_a_state_is_copied_when_it_is_added() -> None:
    state = array("f", [1.0, 0.0])
    pooling = Pooling("mean", 2)
    pooling.add(state)
    state[0] = 9.0
    assert struct.unpack("<2f", pooling.unit()) == (1.0, 0.0)


def test_several_states_at_once_are_the_same_as_one_by_one() -> None:
    pooling = Pooling("weighted-mean", 3)
    pooling.add(array("f", [*STATES[0], *STATES[1]]))
    pooling.add(array("f", STATES[2]))
    assert list(struct.unpack("<3f", pooling.unit())) == unit("weighted-mean", STATES)


def test_zeros_stay_zeros() -> None:
    assert unit("mean", [[0.0, 0.0, 0.0]]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["last", "mean", "weighted-mean"])
def test_values_that_are_not_finite_are_refused(kind: str, bad: float) -> None:
    with pytest.raises(NotFinite):
        unit(kind, [[1.0, bad]])
