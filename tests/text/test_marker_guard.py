"""The guard between user text and control tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai.text.marker_guard import SENTINEL, MarkerGuard, is_marker, map_strings, strings
from tinyoai.wire import Special, Text

GUARD = MarkerGuard(
    ["<|im_start|>", "<|im_end|>", "</s>", "<s>", "[INST]", "  ", "user", "\u2581\u2581", "<s><s>"]
)
PIECES = ["<|im_start|>", "<|im_end|>", "</s>", "<s>", "[INST]", "<|im_", "start|>", "<", ">", "s", " ", "\n", SENTINEL,
          "x", "\u00e9"]  # fmt: skip
MIXED = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|im_start|>", True),
        ("[INST]", True),
        ("\u2581<EOT>", True),
        ("<0>", True),
        ("#!", True),
        ("   ", False),
        ("\n\n", False),
        ("\u2581\u2581", False),
        ("user", False),
        ("\u2581the", False),
        ("<", False),
        ("", False),
    ],
)
def test_what_a_marker_is(text: str, expected: bool) -> None:
    assert is_marker(text) is expected


def test_split_takes_the_longest_marker_at_each_place() -> None:
    assert GUARD.split("a<s><s><s></s>b") == [
        Text("a"),
        Special("<s><s>"),
        Special("<s>"),
        Special("</s>"),
        Text("b"),
    ]
    assert GUARD.split("") == []


def test_the_sentinel_leaves_no_trace() -> None:
    assert GUARD.split(GUARD.weak("a</s>b")) == [Text("a</s>b")]
    assert GUARD.split(f"<s>{GUARD.weak('</s>')}x</s>") == [Special("<s>"), Text("</s>x"), Special("</s>")]


def test_text_without_a_marker_is_unchanged() -> None:
    for text in ("a < b > c", "[INST", "user  user", "<|im_", "start|>", "\u00e9</S>"):
        assert GUARD.weak(text) == text


@given(MIXED)
def test_guarded_text_holds_no_marker_and_comes_back_whole(text: str) -> None:
    wanted = text.replace(SENTINEL, "\N{REPLACEMENT CHARACTER}")
    for guarded in (GUARD.weak(text), GUARD.strong(text)):
        assert GUARD.split(guarded) == ([Text(wanted)] if wanted else [])


@given(MIXED)
def test_strong_leaves_outer_whitespace_to_templates_that_trim(text: str) -> None:
    guarded = GUARD.strong(text)
    assert guarded.strip().replace(SENTINEL, "") == guarded.replace(SENTINEL, "").strip()


@given(MIXED, MIXED)
def test_strong_texts_make_no_marker_together(one: str, two: str) -> None:
    if GUARD.suspicious(one) and GUARD.suspicious(two):
        assert not any(isinstance(s, Special) for s in GUARD.split(GUARD.strong(one) + GUARD.strong(two)))


@pytest.mark.parametrize("text", ["a<b", "x]", "im_start", " IM_END ", "|im_start|", "/s"])
def test_suspicious_texts(text: str) -> None:
    assert GUARD.suspicious(text)


@pytest.mark.parametrize("text", ["", " ", "Hello, world!", "{a: 1}", "start it"])
def test_innocent_texts(text: str) -> None:
    assert not GUARD.suspicious(text)
    assert GUARD.strong(text) == text


def test_a_model_without_markers() -> None:
    guard = MarkerGuard([])
    assert guard.weak("<s>") == guard.strong("<s>") == "<s>"
    assert guard.split("<s>") == [Text("<s>")]


def test_strings_of_nested_values_are_changed_in_a_copy() -> None:
    value = {"a": ["b", {"c": 1, "d": None}], "e": True}
    assert map_strings(value, str.upper) == {"A": ["B", {"C": 1, "D": None}], "E": True}
    assert value == {"a": ["b", {"c": 1, "d": None}], "e": True}
    assert sorted(strings(value)) == ["a", "b", "c", "d", "e"]


def test_many_markers_and_a_long_text_take_no_time() -> None:
    guard = MarkerGuard([f"<unused{i}>" for i in range(7000)])
    assert guard.weak("<u<" * 100_000 + "<unused6999>").count(SENTINEL) == 1
