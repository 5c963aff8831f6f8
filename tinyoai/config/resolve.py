"""Resolves options: flags over environment over configuration file over defaults.

Parses and checks every value, and names the source of a wrong one in the error.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tinyoai.config.options import OPTIONS, Config, Option, Value
from tinyoai.errors import UsageError

BOOLEANS = {"true": True, "false": False, "1": True, "0": False}
"""The texts of a boolean option."""
RawText = str | Sequence[str]
"""An unparsed value; a sequence if the option may be repeated."""


class FileValues(NamedTuple):
    """Values set by a configuration file, by option name."""

    path: str
    values: Mapping[str, RawText]


class RawValue(NamedTuple):
    """An unparsed value and its source."""

    text: RawText
    source: str
    """A flag, a variable, or a key and its file. Error messages begin with it."""
    exit_code: int = 2
    """The exit code of an error in the value: 1 if it comes from the file."""


def lookup(
    option: Option,
    flags: Mapping[str, RawText],
    environment: Mapping[str, str],
    file: FileValues | None = None,
) -> RawValue | None:
    """The value with the highest precedence; None if only the default applies."""
    if option.name in flags:
        return RawValue(flags[option.name], option.flag)
    if environment.get(option.variable):
        return RawValue(environment[option.variable], option.variable)
    if file is not None and option.name in file.values:
        return RawValue(file.values[option.name], f"{option.key} in {file.path}", 1)
    return None


def resolve(
    flags: Mapping[str, RawText], environment: Mapping[str, str], file: FileValues | None = None
) -> Config:
    """The checked configuration. Raises UsageError that names the source of a wrong value."""
    values: dict[str, Any] = {}
    for option in OPTIONS:
        raw = lookup(option, flags, environment, file)
        values[option.name] = option.default if raw is None else parse(option, raw)
    return Config(**values)


def attribute_error(
    error: UsageError,
    flags: Mapping[str, RawText],
    environment: Mapping[str, str],
    file: FileValues | None,
) -> UsageError:
    """The same error, naming the variable or the file's key instead of the flag if the value came from there."""
    for option in OPTIONS:
        if str(error).startswith(option.flag + ":"):
            raw = lookup(option, flags, environment, file)
            if raw is not None:
                return UsageError(
                    raw.source + str(error).removeprefix(option.flag),
                    exit_code=min(raw.exit_code, error.exit_code),
                )
    return error


def parse(option: Option, raw: RawValue) -> Value:
    """The value in the option's type. Raises UsageError if it has another type or is out of bounds."""
    if isinstance(option.default, tuple):
        texts = [raw.text] if isinstance(raw.text, str) else raw.text
        parts = tuple(part.strip() for text in texts for part in text.split(",") if part.strip())
        if not parts:  # --api-key "$KEY" with KEY unset must not start a server without keys
            raise UsageError(
                f"{raw.source}: the value is empty; give one or leave the option out", exit_code=raw.exit_code
            )
        return parts
    try:
        return _parse_scalar(option, str(raw.text), raw.source)
    except UsageError as error:
        raise UsageError(str(error), exit_code=raw.exit_code) from None


def _parse_scalar(option: Option, text: str, source: str) -> str | int | float | bool:
    if isinstance(option.default, bool):
        if text not in BOOLEANS:
            raise UsageError(f"{source}: {text!r} is not true or false")
        return BOOLEANS[text]
    if isinstance(option.default, str):
        if option.choices and text not in option.choices and not option.path:
            choices = ", ".join(choice for choice in option.choices if choice)
            raise UsageError(f"{source}: {text!r} is not one of {choices}")
        return text
    kind: Callable[[str], int | float] = int if isinstance(option.default, int) else float
    try:
        value = kind(text)
    except ValueError:
        noun = "a whole number" if kind is int else "a number"
        raise UsageError(f"{source}: {text!r} is not {noun}") from None
    if not option.low <= value <= option.high:
        raise UsageError(f"{source}: {text} is not between {option.low} and {option.high}")
    return value
