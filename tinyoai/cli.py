"""The command line: flags in, a Config out, and what is said when that fails.

Owns the help text and the exit codes: 0 good, 1 it could not be done, 2 the command is wrong. It
must not know how serving works; `app` does.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

from tinyoai import __version__
from tinyoai.config import OPTIONS, resolve
from tinyoai.errors import UsageError

_ABOUT = "A small local LLM server that speaks OpenAI's HTTP API."

_EXAMPLES = """\
examples:
  tinyoai                                        the built-in model on http://127.0.0.1:8000/v1
  tinyoai --port 0                               on any free port, which is printed
  tinyoai --model llama-2-7b-chat.Q4_K_M.gguf    a model of yours
  tinyoai --model m.gguf --ctx-size 2048 --parallel 2
  tinyoai --model ggml-gpt2.bin --model-type gpt2
  TINYOAI_API_KEY=secret tinyoai --host 0.0.0.0  for other machines that know the key
  tinyoai --rate-limit 60,20000                  60 requests and 20,000 tokens a minute for each client

Every option can also be set by a variable: --ctx-size is TINYOAI_CTX_SIZE. A flag wins over it.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> "None":  # type: ignore[override] # it never returns, by raising
        raise UsageError(f"{message} (see tinyoai --help)")


def _parser() -> _Parser:
    parser = _Parser(
        prog="tinyoai",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "command", nargs="?", metavar="serve", default="serve", help="what to do; the default"
    )
    parser.add_argument("--version", action="version", version=f"tinyoai {__version__}")
    for option in OPTIONS:
        shown = f" (default: {option.default})" if option.default not in ("", 0, ()) else ""
        if option.name == "port":
            shown = f" (default: {option.default})"
        names = "{" + ",".join(c for c in option.choices if c) + "}"
        parser.add_argument(
            option.flag,
            dest=option.name,
            metavar=names if option.choices else option.metavar,
            action="append" if isinstance(option.default, tuple) else "store",
            default=argparse.SUPPRESS,
            help=option.help.replace("%", "%%") + shown,
        )
    return parser


def _check_flags(argv: Sequence[str]) -> None:
    """Names an unknown flag and the one that was meant: argparse would complain of its value first."""
    known = [option.flag for option in OPTIONS] + ["--help", "--version"]
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            close = difflib.get_close_matches(flag, known, 1)
            hint = f"did you mean {close[0]}?" if close else "see tinyoai --help"
            raise UsageError(f"there is no flag {flag}; {hint}")
        if flag.startswith("-") and flag[1:2].isalpha() and flag != "-h":
            raise UsageError(f"there is no flag {flag}; see tinyoai --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    try:
        argv = sys.argv[1:] if argv is None else argv
        _check_flags(argv)
        flags = vars(_parser().parse_args(argv))
        command = flags.pop("command")
        if command != "serve":
            raise UsageError(f"there is no command {command!r}, only serve; a model file is --model FILE")
        config = resolve(flags, os.environ)
        from tinyoai.app import run  # late: --help and a wrong flag need no event loop

        return run(config)
    except UsageError as error:
        print(f"tinyoai: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
