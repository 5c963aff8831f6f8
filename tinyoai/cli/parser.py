"""Command line parsing: one argument parser per command, with one-line errors that suggest the nearest flag."""

import argparse
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tinyoai.config.options import OPTIONS, Option
from tinyoai.errors import UsageError
from tinyoai.host import datadir

Flags = dict[str, Any]
"""Given flags by the option's name."""

HOME = next(option for option in OPTIONS if option.name == "home")


class Parser(argparse.ArgumentParser):
    """Parses the flags of one command. Errors are UsageErrors."""

    def __init__(self, command: str = "", *, about: str, examples: str) -> None:
        super().__init__(
            prog=f"tinyoai {command}".strip(),
            description=about,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._known = ["--help", "-h"]

    def error(self, message: str) -> NoReturn:
        """Raises UsageError; argparse calls this."""
        message = re.sub(r"^argument (\S+): ignored explicit argument .*", r"\1 takes no value", message)
        raise UsageError(f"{message} (see {self.prog} --help)")

    def add_flag(self, *names: str, **settings: Any) -> None:
        """Adds a flag; the settings are those of `add_argument`."""
        self._known += names
        self.add_argument(*names, **settings)

    def add_option(self, option: Option) -> None:
        """Adds an option's flag. That of a boolean has no value."""
        if isinstance(option.default, bool):
            self.add_flag(
                option.flag,
                dest=option.name,
                action="store_const",
                const="true",
                default=argparse.SUPPRESS,
                help=option.help,
            )
            return
        has_default = option.default not in ("", 0, ()) or option.name == "port"
        choices = "{" + ",".join(choice for choice in option.choices if choice) + "}"
        self.add_flag(
            option.flag,
            dest=option.name,
            metavar=option.metavar or choices,
            action="append" if isinstance(option.default, tuple) else "store",
            default=argparse.SUPPRESS,
            help=option.help.replace("%", "%%") + (f" (default: {option.default})" if has_default else ""),
        )

    def add_options(self) -> None:
        """Adds the flags of all options."""
        for option in OPTIONS:
            self.add_option(option)

    def flags(self, argv: Sequence[str]) -> Flags:
        """The given flags. Raises UsageError that names an unknown flag and suggests the nearest."""
        for word in argv:  # argparse would report the value of an unknown flag instead of the flag
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in self._known:
                raise UsageError(f"unknown flag {flag}; {suggest(flag, self._known, self._see_help)}")
            if flag.startswith("-") and flag[1:2].isalpha() and flag[:2] not in self._known:
                raise UsageError(f"unknown flag {flag}; {self._see_help}")
        return vars(self.parse_args(argv))

    @property
    def _see_help(self) -> str:
        return f"see {self.prog} --help"


def suggest(word: str, known: Iterable[str], otherwise: str) -> str:
    """A question that names the known word nearest to `word`; `otherwise` if none is near."""
    import difflib  # only errors need it

    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]}?" if close else otherwise


def data_dir(flags: Mapping[str, Any]) -> Path:
    """The data directory of --home, TINYOAI_HOME or the default. Raises UsageError."""
    return datadir.folder(flags.get("home") or os.environ.get(HOME.variable, ""))
