"""The configuration file on disk: reading it, changing it, and telling what holds and why.

Owns `config.json` in the data directory, what `get` shows, and that a key is never shown whole. Changes are made
by one process after another, each to a file that was checked as a whole. It must not know what a key means.
"""

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tinyoai.config import options
from tinyoai.config.options import OPTIONS, Given, Option, Stored
from tinyoai.errors import UsageError
from tinyoai.host import datadir

FILE = "config.json"
LOCK = "config.lock"
SECRET = ("api_key",)
"""Options that are shown in part."""

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""Reasons for which there cannot be a file; any other might hide one that asks for keys."""


def read(place: Path) -> Stored:
    """What the file sets; nothing where there is none. Raises UsageError naming the file, and the key."""
    return options.stored(_raw(place), str(place / FILE))


def _raw(place: Path) -> dict[str, Any]:
    path = place / FILE
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"the configuration file {path} is no file; move it away", exit_code=1)
        return options.decode(path.read_bytes(), str(path))
    except OSError as error:
        if error.errno in _NOT_THERE:
            return {}
        reason = error.strerror or str(error)
        raise UsageError(f"the configuration file {path} cannot be read: {reason}", exit_code=1) from None


# -- changing ----------------------------------------------------------------------------------------


def change(
    place: Path, pairs: Sequence[str], check: Callable[[options.Config], None]
) -> list[tuple[Option, Any]]:
    """Sets every key=value, or none of them; what was set.

    `check` is given the whole configuration that would hold, without flags and environment. Raises UsageError with
    the key for a value that a flag would not take.
    """
    changes: dict[str, tuple[Option, Any]] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"{pair!r} sets nothing; write it as key=value, such as http.port=9090")
        option = options.find(name)
        if option.key in changes:
            several = "; put commas between its values" if isinstance(option.default, tuple) else ""
            raise UsageError(f"{option.key} is given twice{several}")
        if not text.isprintable():  # a byte that is no UTF-8 is none either, and no file could hold it
            raise UsageError(f"{option.key}: {text!r} holds what cannot be printed")
        if option.name == "home":
            raise UsageError("home: that is where the configuration file is; use --home or TINYOAI_HOME")
        if option.path and text:
            text = os.path.abspath(os.path.expanduser(text))
        value = options.parse(option, Given(text, option.key))
        changes[option.key] = option, list(value) if isinstance(value, tuple) else value
    with datadir.turn(place / LOCK):
        settings = {k: v for k, v in _raw(place).items() if _key(k) not in changes}
        settings |= {key: value for key, (_, value) in changes.items()}
        merged = options.stored(settings, str(place / FILE))
        try:
            check(options.resolve({}, {}, merged))
        except UsageError as error:
            told = str(options.blame(error, {}, {}, merged))
            for key in changes:
                told = told.replace(f"{key} in {merged.path}:", f"{key}:", 1)
            raise UsageError(told, exit_code=2) from None
        _write(place, settings)
    return list(changes.values())


def remove(place: Path, names: Sequence[str]) -> list[str]:
    """Takes keys off the file, wrong ones too; those that were there. Raises UsageError for an unknown one."""
    with datadir.turn(place / LOCK):
        settings = _raw(place)
        gone = []
        for name in names:
            wanted = name if name in settings else options.find(name).key
            found = [key for key in settings if key == wanted or _key(key) == wanted]
            for key in found:
                del settings[key]
            gone += found
        if gone:
            _write(place, settings)
    return gone


def _key(name: str) -> str:
    """A key as the table has it; one that is unknown as it is."""
    try:
        return options.find(name).key
    except UsageError:
        return name


def _write(place: Path, settings: Mapping[str, Any]) -> None:
    text = msgspec.json.format(msgspec.json.encode(dict(sorted(settings.items()))))
    datadir.write(place / FILE, text + b"\n")


# -- showing -----------------------------------------------------------------------------------------


def choose(names: Sequence[str]) -> tuple[list[Option], bool]:
    """The options of keys and of groups, all without any; and whether exactly one key was asked for."""
    if not names:
        order = list(
            dict.fromkeys(map(options.group, sorted(OPTIONS, key=lambda option: "." not in option.key)))
        )
        return sorted(OPTIONS, key=lambda option: order.index(options.group(option))), False
    chosen: list[Option] = []
    for name in names:
        members = [option for option in OPTIONS if options.group(option) == name and "." in option.key]
        chosen += members or [options.find(name)]
    return chosen, len(names) == len(chosen) == 1


def shown(option: Option, value: object) -> Any:
    """A value as it may be shown: of a secret just enough to tell it from another."""
    if isinstance(value, tuple | list):
        return [masked(str(part)) if option.name in SECRET else part for part in value]
    return value


def masked(secret: str) -> str:
    """The first characters of a long secret, nothing of a short one."""
    return f"{secret[:4] if len(secret) >= 16 else ''}********"


def plain(option: Option, value: object) -> str:
    """A value on one line."""
    value = shown(option, value)
    return ",".join(value) if isinstance(value, list) else str(value)


def holds(
    option: Option, environment: Mapping[str, str], file: Stored
) -> tuple[str | int | float | tuple[str, ...], str]:
    """The value that a server would take without flags, and where it comes from: "" is the default."""
    found = options.given(option, {}, environment, file)
    if found is None:
        return option.default, ""
    return options.parse(option, found), option.variable if found.source == option.variable else FILE
