"""The `tinyoai` command: finds the subcommand, runs it, and turns errors into one line and an exit code.

Exit codes: 0 success, 1 failure, 2 wrong usage, 3 no server runs, 130 Ctrl-C. Each command imports its module when
it runs, so that `tinyoai status` does not import a server.
"""

import os
import sys
from collections.abc import Callable, Sequence

from tinyoai.errors import UsageError


def _serve(argv: Sequence[str]) -> int:
    from tinyoai.cli import serve

    return serve.run(argv, list(COMMANDS))


def _status(argv: Sequence[str]) -> int:
    from tinyoai.cli import status

    return status.run(argv)


def _agent(argv: Sequence[str]) -> int:
    from tinyoai.cli import agent_commands

    return agent_commands.run(argv)


def _cache(argv: Sequence[str]) -> int:
    from tinyoai.cli import cache

    return cache.run(argv)


def _get(argv: Sequence[str]) -> int:
    from tinyoai.cli import configure

    return configure.run_get(argv)


def _set(argv: Sequence[str]) -> int:
    from tinyoai.cli import configure

    return configure.run_set(argv)


def _unset(argv: Sequence[str]) -> int:
    from tinyoai.cli import configure

    return configure.run_unset(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": _serve,
    "status": _status,
    "agent": _agent,
    "cache": _cache,
    "get": _get,
    "set": _set,
    "unset": _unset,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    try:
        argv = sys.argv[1:] if argv is None else argv
        if not argv or argv[0] == "serve" or argv[0] not in COMMANDS:
            return _serve(argv)
        code = COMMANDS[argv[0]](argv[1:])
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"tinyoai: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # as in tinyoai agent logs | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        return 130
