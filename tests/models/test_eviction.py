"""The models that are unloaded for another one: examples, and the rule over random loads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai.models.eviction import Decision, Loaded, plan

GB = 1 << 30


def loaded(name: str, size: int, n_leases: int, last_used: float) -> Loaded:
    """Returns a model of `size` gigabytes."""
    return Loaded(name, size * GB, n_leases, last_used)


@pytest.mark.parametrize(
    ("models", "wanted", "decision"),
    [
        ([], 4, Decision()),
        ([], 9, Decision(refuse=True)),
        ([loaded("a", 4, 0, 1)], 4, Decision()),
        ([loaded("a", 5, 0, 1)], 4, Decision(unload=("a",))),
        ([loaded("a", 3, 0, 2), loaded("b", 3, 0, 1)], 4, Decision(unload=("b",))),
        ([loaded("a", 3, 0, 1), loaded("b", 3, 0, 2)], 6, Decision(unload=("a", "b"))),
        ([loaded("a", 3, 1, 1), loaded("b", 3, 0, 2)], 4, Decision(unload=("b",))),
        ([loaded("a", 5, 1, 1)], 4, Decision(wait=True)),
        ([loaded("a", 4, 1, 1), loaded("b", 2, 0, 1)], 5, Decision(wait=True)),
        ([loaded("a", 8, 1, 1)], 9, Decision(refuse=True)),
    ],
)
def test_examples_with_a_budget_of_8(models: list[Loaded], wanted: int, decision: Decision) -> None:
    assert plan(models, wanted * GB, 8 * GB) == decision


MODELS = st.lists(
    st.builds(
        Loaded, st.uuids().map(str), st.integers(0, 100), st.integers(0, 1), st.floats(0, 100, width=16)
    ),
    max_size=8,
)


@given(MODELS, st.integers(0, 120), st.integers(0, 300))
def test_the_rule(models: list[Loaded], wanted: int, budget: int) -> None:
    decision = plan(models, wanted, budget)
    assert decision.refuse == (wanted > budget)
    by_name = {model.name: model for model in models}
    gone = [by_name[name] for name in decision.unload]
    assert len(set(decision.unload)) == len(gone)
    assert all(not model.n_leases for model in gone)
    left = [model for model in models if model not in gone]
    held = sum(model.size for model in left)
    if decision.refuse or decision.wait:
        assert not gone
        busy = sum(model.size for model in models if model.n_leases)
        assert decision.refuse or busy + wanted > budget
        return
    assert held + wanted <= budget
    # the least recently used models went first, and no more than necessary
    assert all(old.last_used <= kept.last_used for old in gone for kept in left if not kept.n_leases)
    assert not gone or held + gone[-1].size + wanted > budget
