"""Bounds on what a template computes: the size of each result, known before it is made.

Jinja has no limit on memory. One call of a C function can take gigabytes or minutes, and nothing can interrupt it.
So the sizes of such results are computed first.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

MAX_WIDTH = 10_000
"""Characters that padding can add to one value."""
MAX_ITEMS = 100_000
"""Items of a nested value that is written as text."""
MAX_DEPTH = 64
MAX_BITS = 4096
"""Bits of an integer."""
MAX_MEMORY = 256 << 20
"""Bytes that all results of one rendering take together."""

_PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?")
_FIELD = re.compile(r"\{[^{}]*(\{)?")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


STR_METHODS = _names(
    "capitalize casefold center count endswith expandtabs find format index isalnum isalpha isascii isdecimal "
    "isdigit islower isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix "
    "replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper "
    "zfill"
)
LIST_METHODS = _names("append clear copy count extend index insert pop remove reverse")
DICT_METHODS = _names("clear copy get items keys pop popitem setdefault update values")


class TooMuch(Exception):
    """The template asks for more than it may have; the message goes on after "the chat template"."""


class Budget:
    """What one rendering may still take."""

    def __init__(self, max_chars: int, plain: tuple[type, ...] = ()) -> None:
        """Values of the `plain` types have short texts."""
        self.max_chars = max_chars
        """The longest text."""
        self._plain: tuple[type, ...] = (int, float, range, type(None), *plain)
        self._spent = 0

    def reset(self) -> None:
        """Begins a rendering."""
        self._spent = 0

    def expect(self, n_chars: int) -> None:
        """A text of this length comes next. Raises TooMuch."""
        if n_chars > self.max_chars:
            raise TooMuch(f"makes a text of more than {self.max_chars} characters")

    def spend(self, value: object, *, new_items: bool = False) -> None:
        """This value was made, and with `new_items` perhaps its items too. Raises TooMuch."""
        if isinstance(value, (str, list, dict, tuple)):
            n_items = len(value) if new_items and isinstance(value, list) else 0
            self._spend(sys.getsizeof(value) + 32 * n_items)

    def _spend(self, n_bytes: int) -> None:
        self._spent += n_bytes
        if self._spent > MAX_MEMORY:
            raise TooMuch(f"needs more than {MAX_MEMORY >> 20} MB of memory")

    # -- single results --------------------------------------------------------------------------

    def text(self, value: object) -> str:
        """The value as Jinja writes it. Raises TooMuch for what is large, or has no text of its own."""
        if isinstance(value, str):
            return value
        if isinstance(value, list | tuple | dict):
            self.measure(value)
        elif not isinstance(value, self._plain):
            raise TooMuch(f"writes a value of type {type(value).__name__} as text")
        text = str(value)
        self.expect(len(text))
        return text

    def measure(self, value: object) -> None:
        """Raises TooMuch for a nested value that is too large or deep to be written as text."""
        pending: list[tuple[object, int]] = [(value, 0)]
        n_items = n_chars = 0
        while pending:
            item, depth = pending.pop()
            n_items += 1
            if isinstance(item, str):
                n_chars += len(item)
            elif isinstance(item, dict):
                pending += [(part, depth + 1) for pair in item.items() for part in pair]
            elif isinstance(item, list | tuple):
                pending += [(part, depth + 1) for part in item]
            elif not isinstance(item, self._plain):
                raise TooMuch(f"writes a value of type {type(item).__name__} as text")
            if n_items + len(pending) > MAX_ITEMS or depth > MAX_DEPTH:
                raise TooMuch(f"writes a value of over {MAX_ITEMS} items or {MAX_DEPTH} levels as text")
        self.expect(n_chars)

    def binary(self, operator: str, left: Any, right: Any) -> None:
        """Checks an operator's result before it is made."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            bits = bits * max(right, 0) if operator == "**" else bits + right.bit_length()
            if bits > MAX_BITS:
                raise TooMuch(f"computes a number of more than {MAX_BITS} bits")
        elif operator == "+" and isinstance(left, str | list | tuple):
            self._sequence(left, len(left) + (len(right) if isinstance(right, str | list | tuple) else 0))
        elif operator == "*":
            repeated, times = (left, right) if isinstance(right, int) else (right, left)
            if isinstance(repeated, str | list | tuple) and isinstance(times, int):
                self._sequence(repeated, len(repeated) * max(0, times))
        elif operator == "%" and isinstance(left, str):
            self.percent(left, right)

    def _sequence(self, kind: object, length: int) -> None:
        if isinstance(kind, str):
            self.expect(length)
        else:
            self._spend(8 * length)

    def width(self, width: object) -> None:
        """Checks the width of a padding."""
        if isinstance(width, int) and abs(width) > MAX_WIDTH:
            raise TooMuch(f"pads a text to more than {MAX_WIDTH} characters")

    def percent(self, form: str, values: Any) -> None:
        """Checks `form % values`."""
        specs = _PERCENT.findall(form)
        parts: Sequence[Any] = (
            values
            if isinstance(values, tuple)
            else [*values.values()]
            if isinstance(values, dict)
            else [values]
        )
        if any("*" in spec for spec in specs):
            raise TooMuch("takes the width of a padding from a value")
        self._fields(form, [width for spec in specs for width in spec], len(specs), parts)

    def format(self, form: str, values: Iterable[Any]) -> None:
        """Checks `form.format(values)`."""
        form = form.replace("{{", "").replace("}}", "")
        found = list(_FIELD.finditer(form))
        if any(field[1] for field in found):
            raise TooMuch("takes the width of a padding from a value")
        widths = [w for field in found for w in re.findall(r"\d+", field[0].partition(":")[2])]
        self._fields(form, widths, len(found), [*values])

    def _fields(self, form: str, widths: Sequence[str], n_fields: int, values: Sequence[Any]) -> None:
        for width in widths:
            if len(width) > 5:
                self.width(MAX_WIDTH + 1)
            self.width(int(width or 0))
        longest = max((len(self.text(value)) for value in values), default=0)
        self.expect(len(form) + sum(int(width or 0) for width in widths) + n_fields * longest)

    def replacing(self, text: str, old: str, new: str) -> None:
        """Checks `text.replace(old, new)`."""
        self.expect(len(text) + text.count(old) * max(0, len(new) - len(old)))

    def joining(self, separator: str, parts: Sequence[str]) -> None:
        """Checks `separator.join(parts)`."""
        self.expect(sum(map(len, parts)) + len(separator) * len(parts))

    # -- methods ---------------------------------------------------------------------------------

    def method(self, owner: object, name: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Checks a call of a built-in method; may replace an argument by a list. Raises TooMuch."""
        known = (
            STR_METHODS
            if isinstance(owner, str)
            else LIST_METHODS
            if isinstance(owner, list)
            else DICT_METHODS
            if isinstance(owner, dict)
            else frozenset({"count", "index"})
        )
        if name not in known:
            raise TooMuch(f"calls {type(owner).__name__}.{name}, which it may not")
        for value in (*args, *kwargs.values()):
            self.width(value)
        if isinstance(owner, str):
            self._str_method(owner, name, args)
        elif name == "extend" or (name == "update" and args):
            if not isinstance(args[0], list | tuple | dict):
                args[0] = list(args[0])
            self._spend(128 * len(args[0]))
        elif args:
            self._spend(128)
            self.spend(args[-1])

    def _str_method(self, text: str, name: str, args: list[Any]) -> None:
        if name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
            self.replacing(text, args[0], args[1])
        elif name == "join" and args:
            args[0] = list(args[0])
            self.joining(text, [part for part in args[0] if isinstance(part, str)])
        elif name == "expandtabs":
            self.expect(len(text) + text.count("\t") * (args[0] if args and isinstance(args[0], int) else 8))
