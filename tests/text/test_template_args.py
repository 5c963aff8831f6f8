"""Further variables of templates: the names and the sizes that a request may give."""

from typing import Any

import pytest

from tinyoai.text.jinja import JinjaTemplate
from tinyoai.text.template_args import RESERVED, problem


@pytest.mark.parametrize(
    "args", [{}, {"enable_thinking": False, "documents": [{"text": "a"}], "n": 2**63 - 1, "x": None}]
)
def test_right_arguments(args: dict[str, Any]) -> None:
    assert problem(args) == ""


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("args", "words"),
    [
        *(({name: 1}, f"'{name}' is set by the server; remove it") for name in sorted(RESERVED)),
        ({"": 1}, "is not a name"),
        ({"_x": 1}, "is not a name"),
        ({"a b": 1}, "is not a name"),
        ({"x" * 65: 1}, "is not a name"),
        ({"x": "a\0"}, "NUL"),
        ({"x": {"a\0": 1}}, "NUL"),
        ({"x": 2**63}, "64 bits"),
        ({"x": [-(2**64)]}, "64 bits"),
        ({"x": nested(17)}, "deeper than 16"),
        ({"x": [0] * 10_000}, "10000 values"),
        ({"x": ["a" * 1000] * 1100}, "1048576 characters"),
    ],
)
def test_wrong_arguments(args: dict[str, Any], words: str) -> None:
    assert words in problem(args)


def test_the_deepest_and_the_most() -> None:
    assert problem({"x": nested(16)}) == ""
    assert problem({"x": [0] * 9_999}) == ""


def test_every_function_of_templates_is_reserved() -> None:
    assert JinjaTemplate("", bos="", eos="", max_output=1).names <= RESERVED
