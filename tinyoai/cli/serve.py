"""The `serve` command: resolves the options, starts the first worker, then imports and runs the server."""

import contextlib
import os
from collections.abc import Sequence

from tinyoai import __version__
from tinyoai.cli import help as texts
from tinyoai.cli.parser import Flags, Parser, data_dir, suggest
from tinyoai.config import config_file
from tinyoai.config.resolve import FileValues, attribute_error, resolve
from tinyoai.errors import UsageError


def run(argv: Sequence[str], commands: Sequence[str]) -> int:
    """Serves until told to stop. Returns the exit code; raises UsageError if the server cannot start."""
    flags = _parse(argv, commands)
    file = _read_file(flags)
    config = resolve(flags, os.environ, file)
    from tinyoai.models.spawn import spawn_worker

    # the worker's imports take as long as the server's: start it before importing the server
    try:
        worker = spawn_worker()
    except OSError as error:
        raise UsageError(f"cannot start a worker process: {error.strerror}", exit_code=1) from None
    with contextlib.closing(worker) as spawned:
        from tinyoai.app import run as run_server
        from tinyoai.cli import banner

        try:
            return run_server(config, spawned=spawned, on_ready=banner.show)
        except UsageError as error:
            raise attribute_error(error, flags, os.environ, file) from None


def _parse(argv: Sequence[str], commands: Sequence[str]) -> Flags:
    parser = Parser(about=texts.ABOUT, examples=texts.SERVE)
    parser.add_argument(
        "command", nargs="?", metavar="serve", default="serve", help="the command; serve is the default"
    )
    parser.add_flag("--version", action="version", version=f"tinyoai {__version__}")
    parser.add_options()
    flags = parser.flags(argv)
    command = flags.pop("command")
    if command == "serve":
        return flags
    if command in commands:
        raise UsageError(f"the command {command} comes first: tinyoai {command} ...")
    hint = suggest(command, commands, "see tinyoai --help; to serve a model file, use --model FILE")
    raise UsageError(f"unknown command {command!r}; {hint}")


def _read_file(flags: Flags) -> FileValues | None:
    """The configuration file's values; None for a user without a data directory."""
    try:
        folder = data_dir(flags)
    except UsageError:
        return None
    return config_file.read(folder)
