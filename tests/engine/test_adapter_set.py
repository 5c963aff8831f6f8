"""The LoRA adapters that a request asks for."""

import math

import pytest

from tinyoai.engine.adapter_set import chosen
from tinyoai.wire import Adapter

KNOWN = (Adapter("a", 0.5), Adapter("b", 0.0), Adapter("c", 1.0))


def test_without_a_choice_the_loads_own_apply() -> None:
    assert chosen(None, KNOWN) == (Adapter("a", 0.5), Adapter("c", 1.0))
    assert chosen(None, ()) == ()


def test_an_empty_choice_is_none_at_all() -> None:
    assert chosen((), KNOWN) == chosen((), ()) == ()


def test_equal_sets_are_equal_however_they_are_asked_for() -> None:
    expected = (Adapter("a", 2.0), Adapter("b", -1.0))
    assert chosen((Adapter("b", -1.0), Adapter("a", 2.0)), KNOWN) == expected
    assert chosen((Adapter(1, -1.0), Adapter(0, 2.0), Adapter("c", 0.0)), KNOWN) == expected


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([Adapter("x")], "no LoRA adapter 'x'; available: 'a', 'b', 'c'"),
        ([Adapter(3)], "no LoRA adapter with the id 3; available"),
        ([Adapter(-1)], "no LoRA adapter with the id -1"),
        ([Adapter("a"), Adapter(0)], "'a' is named twice"),
        ([Adapter("a", 100.5)], "choose one between -100 and 100"),
        ([Adapter("a", -math.inf)], "choose one between"),
        ([Adapter("a", math.nan)], "choose one between"),
    ],
)
def test_wrong_choices_are_refused_in_words(asked: list[Adapter], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        chosen(asked, KNOWN)


def test_a_model_without_adapters_refuses_any() -> None:
    with pytest.raises(ValueError, match="has no LoRA adapters"):
        chosen([Adapter("a", 0.0)], ())
