"""Checks `chat_template_kwargs`: further variables that a request gives to a model's Jinja template."""

import re
from typing import Any

RESERVED = frozenset(
    {
        "messages", "tools", "add_generation_prompt",
        "bos_token", "eos_token", "unk_token", "pad_token",
        "raise_exception", "strftime_now", "namespace", "range", "dict", "cycler", "joiner",
        "loop", "self", "super", "caller", "varargs", "kwargs",
    }
)  # fmt: skip
"""Variables that templates get from elsewhere."""

MAX_VALUES = 10_000
"""Values in all, nested ones included."""
MAX_DEPTH = 16
MAX_CHARS = 1 << 20
"""Characters of all strings together."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


def problem(args: dict[str, Any]) -> str:
    """Returns why these variables are refused, in words that follow "chat_template_kwargs: "; empty if they are not."""
    for name in args:
        if name in RESERVED:
            return f"{name!r} is set by the server; remove it"
        if not _NAME.fullmatch(name):
            return f"{name[:64]!r} is not a name; use letters, digits and underscores, at most 64"
    n_values = n_chars = 0
    pending: list[tuple[Any, int]] = [(value, 1) for value in args.values()]
    while pending:
        value, depth = pending.pop()
        n_values += 1
        if isinstance(value, str):
            n_chars += len(value)
            if "\0" in value:
                return "a text contains a NUL character; remove it"
        elif isinstance(value, dict):
            pending += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            pending += [(part, depth + 1) for part in value]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            return "a number has more than 64 bits"
        if depth > MAX_DEPTH:
            return f"the values are nested deeper than {MAX_DEPTH} levels"
        if n_values + len(pending) > MAX_VALUES or n_chars > MAX_CHARS:
            return f"the limit is {MAX_VALUES} values and {MAX_CHARS} characters"
    return ""
