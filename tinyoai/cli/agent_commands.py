"""The commands `agent start`, `stop`, `restart`, `status` and `logs`."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tinyoai.cli import agent, status
from tinyoai.cli import help as texts
from tinyoai.cli.parser import HOME, Flags, Parser, data_dir, suggest
from tinyoai.config import config_file
from tinyoai.config.options import OPTIONS
from tinyoai.config.resolve import RawText, resolve
from tinyoai.errors import UsageError

API_KEY, API_KEY_FILE = (
    next(option for option in OPTIONS if option.name == name) for name in ("api_key", "api_key_file")
)


def run(argv: Sequence[str]) -> int:
    """Runs an action of the agent and returns the exit code."""
    if argv[:1] in (["--help"], ["-h"]):
        print(texts.AGENT, end="")
        return 0
    if not argv:
        raise UsageError("missing action: start, stop, restart, status or logs")
    action = argv[0]
    if action not in _ACTIONS:
        hint = suggest(action, _ACTIONS, "the actions are start, stop, restart, status and logs")
        raise UsageError(f"unknown action {action!r}; {hint}")
    return _ACTIONS[action](argv[1:])


def _start(argv: Sequence[str]) -> int:
    flags = _parse_serve_flags("agent start", "Starts the server in the background.", texts.AGENT_START, argv)
    return _start_agent(data_dir(flags), flags)


def _restart(argv: Sequence[str]) -> int:
    about = "Stops the server in the background if it runs, and starts it again."
    flags = _parse_serve_flags("agent restart", about, texts.AGENT_RESTART, argv)
    folder = data_dir(flags)
    record = agent.read_record(folder)
    if record is not None and not flags.keys() - {"home"}:
        flags = {**record.flags, **flags}
    config = resolve(flags, os.environ, config_file.read(folder))  # an error must not stop the old agent
    if record is not None and record.had_api_keys and not (config.api_key or config.api_key_file):
        raise UsageError(
            "the agent had API keys, which are not stored: set TINYOAI_API_KEY or pass --api-key-file again; "
            "to start it without keys, use tinyoai agent stop and tinyoai agent start",
            exit_code=1,
        )
    if agent.current(folder) is not None:
        print(agent.stop(folder), flush=True)
    return _start_agent(folder, flags)


def _parse_serve_flags(command: str, about: str, examples: str, argv: Sequence[str]) -> Flags:
    parser = Parser(command, about=about, examples=examples)
    parser.add_options()
    return parser.flags(argv)


def _start_agent(folder: Path, flags: Flags) -> int:
    """Starts the agent and prints its address."""
    config = resolve(flags, os.environ, config_file.read(folder))
    passed: dict[str, RawText] = {}
    variables: dict[str, str] = {}
    for option in OPTIONS:
        if option.is_path(os.environ.get(option.variable, "")):  # the agent runs in another folder
            variables[option.variable] = os.path.abspath(os.environ[option.variable])
        if option.name in flags and option not in (HOME, API_KEY):
            text = flags[option.name]
            passed[option.name] = os.path.abspath(text) if option.is_path(text) else text
    if API_KEY.name in flags:
        variables[API_KEY.variable] = ",".join(config.api_key)
    has_keys = bool(
        os.environ.get(API_KEY.variable) or variables.keys() & {API_KEY.variable, API_KEY_FILE.variable}
    )
    server, is_new = agent.start(
        folder, passed, variables, has_api_keys=has_keys, load_timeout=config.load_timeout
    )
    if is_new:
        print(f"the agent is ready (pid {server.process.pid})")
        print(f"  base URL  {server.base_url}\n  model     {server.model}\n  docs      {server.url}/docs")
    else:
        hint = "; to apply these flags: tinyoai agent restart" if flags.keys() - {"home"} else ""
        print(f"the agent is already running (pid {server.process.pid}): {server.base_url}{hint}")
    return 0


def _stop(argv: Sequence[str]) -> int:
    parser = Parser("agent stop", about="Stops the server in the background.", examples=texts.AGENT_STOP)
    parser.add_option(HOME)
    print(agent.stop(data_dir(parser.flags(argv))))
    return 0


def _status(argv: Sequence[str]) -> int:
    return status.show("agent status", "Shows the server in the background.", argv, agent_only=True)


def _logs(argv: Sequence[str]) -> int:
    parser = Parser(
        "agent logs", about="Shows the output of the server in the background.", examples=texts.AGENT_LOGS
    )
    parser.add_flag(
        "-n", "--lines", type=int, default=50, metavar="N", help="number of last lines (default: 50)"
    )
    parser.add_flag("-f", "--follow", action="store_true", help="print new lines too, until Ctrl-C")
    parser.add_option(HOME)
    flags = parser.flags(argv)
    if flags["lines"] < 0:
        raise UsageError("-n: must be 0 or more")
    for data in agent.logs(data_dir(flags), flags["lines"], follow=flags["follow"]):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    return 0


_ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {
    "start": _start,
    "stop": _stop,
    "restart": _restart,
    "status": _status,
    "logs": _logs,
}
