"""The cost table of decode steps, measured on the scripted engine."""

from collections.abc import Sequence
from typing import Any

import pytest

from tinyoai.engine.calibration import Calibration
from tinyoai.engine.contract import EngineError, Row
from tinyoai.engine.fake import FakeEngine
from tinyoai.engine.sequences import Sequences
from tinyoai.engine.step_cost import DecodeCost


class Timed(FakeEngine):
    """Each row of a step takes half of what the first takes, on a clock of its own."""

    now = 0.0

    def eval(self, rows: Sequence[Row], until: float = 0.0) -> None:
        super().eval(rows, until)
        self.now += 0.010 + 0.005 * (len(rows) - 1)


def calibration(**fields: Any) -> tuple[Timed, Sequences, DecodeCost, Calibration]:
    """Returns an engine, its sequences, an empty table and the calibration that fills it."""
    engine = Timed(name="fake", **{"batches": True, "n_slots": 5} | fields)
    sequences, cost = Sequences(engine), DecodeCost({1: 99.0})
    return engine, sequences, cost, Calibration(engine, sequences, cost, lambda: engine.now)


def test_each_size_is_measured_in_its_turn() -> None:
    engine, sequences, cost, found = calibration()
    assert found.sizes == [1, 2, 4]
    while found.sizes:
        assert cost.seconds == {1: 0.099}
        found.measure()
    assert cost.seconds == pytest.approx({1: 0.010, 2: 0.015, 4: 0.025})
    assert sequences.n_free == engine.caps.n_kv
    engine.eval([Row(i, [65], 0) for i in range(5)])  # all sequences are empty again


def test_what_slots_hold_is_left_alone() -> None:
    engine, sequences, cost, found = calibration()
    engine.eval([Row(1, [65, 66], 0)])
    sequences.append(sequences.slots[1], [65, 66])
    found.measure()
    found.measure()
    assert found.sizes == []
    assert cost.seconds == {1: 0.099}
    assert sequences.slots[1].tokens == [65, 66]


def test_an_engine_that_fails_keeps_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, sequences, cost, found = calibration()

    def fail(rows: Sequence[Row], until: float = 0.0) -> None:
        raise EngineError("no")

    monkeypatch.setattr(engine, "eval", fail)
    found.measure()
    assert (found.sizes, cost.seconds) == ([], {1: 0.099})
    assert all(not slot.tokens for slot in sequences.slots)


@pytest.mark.parametrize("fields", [{"batches": False}, {"n_slots": 1}])
def test_nothing_is_measured_where_it_changes_nothing(fields: dict[str, Any]) -> None:
    assert calibration(**fields)[3].sizes == []


def test_sequences_that_are_kept_elsewhere_make_way() -> None:
    engine, sequences, cost, _ = calibration()
    kept: list[list[int]] = []
    sequences.on_evict = lambda slot: kept.append(slot.tokens[:])
    engine.eval([Row(1, [65, 66], 0)])
    sequences.append(sequences.slots[1], [65, 66])
    found = Calibration(engine, sequences, cost, lambda: engine.now, may_evict=True)
    while found.sizes:
        found.measure()
    assert set(cost.seconds) == {1, 2, 4}
    assert kept == [[65, 66]]
