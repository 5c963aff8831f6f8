"""The configuration file, config.json in the data directory: reading, changing and showing it.

Changes take a lock and are checked as a whole before they are written. Secrets are never shown in full.
"""

import errno
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tinyoai.config import options
from tinyoai.config.options import OPTIONS, Config, Option, Value
from tinyoai.config.resolve import FileValues, RawText, RawValue, attribute_error, lookup, parse, resolve
from tinyoai.errors import UsageError
from tinyoai.host import datadir, file_lock

FILE = "config.json"
LOCK = "config.lock"
SECRET = ("api_key",)
"""Options that are shown in part."""

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors that mean there is no file. Any other could hide a file that requires API keys."""


def read(data_dir: Path) -> FileValues:
    """The file's values; none if there is no file. Raises UsageError naming the file and the key."""
    return from_json(_read_json(data_dir), str(data_dir / FILE))


def _read_json(data_dir: Path) -> dict[str, Any]:
    path = data_dir / FILE
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"the configuration file {path} is not a regular file", exit_code=1)
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        if error.errno in _ABSENT:
            return {}
        reason = error.strerror or str(error)
        raise UsageError(f"cannot read the configuration file {path}: {reason}", exit_code=1) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise UsageError(
            f"the configuration file {path} is damaged: {error}; repair it, or move it away", exit_code=1
        ) from None


def from_json(settings: Mapping[str, Any], path: str) -> FileValues:
    """The values of decoded JSON, by option name. Raises UsageError naming the file and the key."""
    values: dict[str, RawText] = {}
    for key, value in settings.items():
        try:
            # `tinyoai get` cannot list the keys: it reads this file first
            option = options.find(key, f"remove it with: tinyoai unset {shlex.quote(key)}")
        except UsageError as error:
            raise UsageError(f"the configuration file {path}: {error}", exit_code=1) from None
        source = f"{key} in {path}"
        if option.name == "home":
            raise UsageError(
                f"{source}: the file cannot set its own folder; use --home or TINYOAI_HOME", exit_code=1
            )
        if option.name in values:
            raise UsageError(f"{source}: set twice, under two names", exit_code=1)
        values[option.name] = _raw_text(option, value, source)
    return FileValues(path, values)


def _raw_text(option: Option, value: object, source: str) -> RawText:
    if isinstance(option.default, tuple) and isinstance(value, list) and all(type(v) is str for v in value):
        return tuple(value)
    if isinstance(value, bool) and isinstance(option.default, bool):
        value = str(value).lower()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        kinds = "a string or a number"
        if isinstance(option.default, bool):
            kinds = "true or false"
        elif isinstance(option.default, tuple):
            kinds = "a string or a list of strings"
        raise UsageError(f"{source}: must be {kinds}", exit_code=1)
    if option.is_path(value):
        value = os.path.expanduser(value)
        if not os.path.isabs(value):
            raise UsageError(f"{source}: {value!r} is not an absolute path", exit_code=1)
    return value


# -- changing ----------------------------------------------------------------------------------------


def set_values(
    data_dir: Path, pairs: Sequence[str], check: Callable[[Config], None]
) -> list[tuple[Option, Any]]:
    """Writes every key=value, or none of them. Returns the options and values that were set.

    `check` gets the configuration that the new file makes, without flags and environment. Raises UsageError
    naming the key if a value is wrong.
    """
    changes: dict[str, tuple[Option, Any]] = {}
    for pair in pairs:
        option, value = _parse_pair(pair)
        if option.key in changes:
            hint = "; separate its values by commas" if isinstance(option.default, tuple) else ""
            raise UsageError(f"{option.key} is given twice{hint}")
        changes[option.key] = option, value
    with file_lock.held(data_dir / LOCK):
        settings = {k: v for k, v in _read_json(data_dir).items() if _canonical_key(k) not in changes}
        settings |= {key: value for key, (_, value) in changes.items()}
        merged = from_json(settings, str(data_dir / FILE))
        try:
            check(resolve({}, {}, merged))
        except UsageError as error:
            message = str(attribute_error(error, {}, {}, merged))
            for key in changes:  # the file does not hold these values yet
                message = message.replace(f"{key} in {merged.path}:", f"{key}:", 1)
            raise UsageError(message, exit_code=2) from None
        _write(data_dir, settings)
    return list(changes.values())


def _parse_pair(pair: str) -> tuple[Option, Any]:
    name, equals, text = pair.partition("=")
    if not equals:
        raise UsageError(f"{pair!r} has no value; write key=value, such as http.port=9090")
    option = options.find(name)
    if not text.isprintable():  # includes bytes that are not UTF-8, which JSON cannot hold
        raise UsageError(f"{option.key}: {text!r} contains unprintable characters")
    if option.name == "home":
        raise UsageError("home: the file cannot set its own folder; use --home or TINYOAI_HOME")
    if option.is_path(text):
        text = os.path.abspath(os.path.expanduser(text))
    value = parse(option, RawValue(text, option.key))
    return option, list(value) if isinstance(value, tuple) else value


def unset_values(data_dir: Path, names: Sequence[str]) -> list[str]:
    """Removes keys from the file, invalid ones too. Returns those that were there.

    Raises UsageError for a key that is neither an option's nor in the file.
    """
    with file_lock.held(data_dir / LOCK):
        settings = _read_json(data_dir)
        removed = []
        for name in names:
            wanted = name if name in settings else options.find(name).key
            found = [key for key in settings if key == wanted or _canonical_key(key) == wanted]
            for key in found:
                del settings[key]
            removed += found
        if removed:
            _write(data_dir, settings)
    return removed


def _canonical_key(name: str) -> str:
    """The option's key; an unknown name unchanged."""
    try:
        return options.find(name).key
    except UsageError:
        return name


def _write(data_dir: Path, settings: Mapping[str, Any]) -> None:
    text = msgspec.json.format(msgspec.json.encode(dict(sorted(settings.items()))))
    datadir.write(data_dir / FILE, text + b"\n")


# -- showing -----------------------------------------------------------------------------------------


def select(names: Sequence[str]) -> tuple[list[Option], bool]:
    """The options of keys and groups, or all of them; and whether the names are exactly one key."""
    if not names:
        grouped_last = sorted(OPTIONS, key=lambda option: "." not in option.key)
        order = list(dict.fromkeys(map(options.group, grouped_last)))
        return sorted(OPTIONS, key=lambda option: order.index(options.group(option))), False
    selected: list[Option] = []
    for name in names:
        members = [option for option in OPTIONS if options.group(option) == name and "." in option.key]
        selected += members or [options.find(name)]
    return selected, len(names) == len(selected) == 1


def effective(option: Option, environment: Mapping[str, str], file: FileValues) -> tuple[Value, str]:
    """The value that a server without flags uses, and its source; the source "" is the default."""
    raw = lookup(option, {}, environment, file)
    if raw is None:
        return option.default, ""
    return parse(option, raw), option.variable if raw.source == option.variable else FILE


def displayed(option: Option, value: object) -> Any:
    """The value with secrets masked; a list if the option may be repeated."""
    if isinstance(value, tuple | list):
        return [mask(str(part)) if option.name in SECRET else part for part in value]
    return value


def mask(secret: str) -> str:
    """The first characters of a long secret, none of a short one, and asterisks."""
    return f"{secret[:4] if len(secret) >= 16 else ''}********"


def one_line(option: Option, value: object) -> str:
    """The value as text on one line, with secrets masked."""
    value = displayed(option, value)
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, list) else str(value)
