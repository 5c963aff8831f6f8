"""The command line: which command, its flags in, and what is said when that fails.

Owns the help texts and the exit codes: 0 good, 1 it could not be done, 2 the command is wrong, 3 nothing runs. It
must not know how serving works; `app` does, and is imported for nothing else but serving and `set`.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyoai import __version__
from tinyoai.config import config_file
from tinyoai.config.options import OPTIONS, Config, Option, Stored, Text, blame, resolve
from tinyoai.errors import UsageError
from tinyoai.host import datadir

_ABOUT = """\
A small local LLM server that speaks OpenAI's HTTP API.

commands (each has --help):
  serve                    serve until Ctrl-C; the default, and what the options below are for
  status                   the running servers: base URL, model, memory
  agent start|stop|restart|status|logs
                           the server in the background
  get, set, unset          the configuration file
"""

_EXAMPLES = """\
examples:
  tinyoai                                        the built-in model on http://127.0.0.1:8000/v1
  tinyoai --port 0                               on any free port, which is printed
  tinyoai --model llama-2-7b-chat.Q4_K_M.gguf    a model of yours
  tinyoai --model m.gguf --ctx-size 2048 --parallel 2
  tinyoai --model ggml-gpt2.bin --model-type gpt2
  TINYOAI_API_KEY=secret tinyoai --host 0.0.0.0  for other machines that know the key
  tinyoai --rate-limit 60,20000                  60 requests and 20,000 tokens a minute for each client
  tinyoai agent start --port 9000                in the background

Every option can also be set by a variable: --ctx-size is TINYOAI_CTX_SIZE, and by the configuration file, see
tinyoai get --help. A flag wins over a variable, a variable over the file.
"""

_STATUS = """\
examples:
  tinyoai status
  tinyoai status --json | jq -r '.[0].base_url'

Exit code 0 if a server runs, 3 if none does. No API key is needed.
"""

_GET = """\
examples:
  tinyoai get                  everything, and where it is set
  tinyoai get http             a group
  tinyoai get http.port        one value, alone on its line

The groups are http, model, models, access and log. A flag wins over a variable (TINYOAI_PORT), a variable over the
file, the file over the default. The file is config.json in the data directory. API keys are shown in part.
"""

_SET = """\
examples:
  tinyoai set http.port=9090
  tinyoai set http.host=0.0.0.0 access.api-key-file=keys
  tinyoai set model.file=~/models/llama-2-7b-chat.Q4_K_M.gguf
  tinyoai set http.cors-origin=https://a.example,https://b.example

Every value is checked as a flag's is; if one is wrong, nothing is written. A running server keeps what it has
until tinyoai agent restart, or until it is started again.
"""

_UNSET = """\
examples:
  tinyoai unset http.port
  tinyoai unset model.file model.ctx-size
"""

_AGENT = """\
usage: tinyoai agent start|stop|restart|status|logs [options]

The server in the background. It is one for each data directory; servers that were started otherwise are left alone.

  start     starts it with any flags of tinyoai serve, waits until it is ready and prints its base URL
  stop      lets running answers finish within the grace time, then ends it
  restart   stops it, if it runs, and starts it anew
  status    tinyoai status, of the agent alone
  logs      what it printed and logged

Each has --help.
"""

_START = """\
examples:
  tinyoai agent start
  tinyoai agent start --port 9000 --model m.gguf
  TINYOAI_API_KEY=secret tinyoai agent start --host 0.0.0.0

Its log is agent.log in the data directory. It does not start by itself after the machine did.
"""

_RESTART = """\
examples:
  tinyoai agent restart                 with the flags that it was started with
  tinyoai agent restart --port 9001     with these flags, and none of the old

Flags are remembered, variables and API keys are not: an agent that was given keys is not restarted without any.
"""

_STOP = """\
examples:
  tinyoai agent stop
"""

_LOGS = """\
examples:
  tinyoai agent logs
  tinyoai agent logs -n 200
  tinyoai agent logs --follow
"""

Flags = dict[str, Any]


class _Parser(argparse.ArgumentParser):
    def __init__(self, command: str = "", *, about: str, examples: str) -> None:
        super().__init__(
            prog=f"tinyoai {command}".strip(),
            description=about,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._known = ["--help", "-h"]

    def error(self, message: str) -> "None":  # type: ignore[override] # it never returns, by raising
        raise UsageError(f"{message} (see {self.prog} --help)")

    def flag(self, *names: str, **how: Any) -> None:
        """One more flag."""
        self._known += names
        self.add_argument(*names, **how)

    def option(self, option: Option) -> None:
        """The flag of an option."""
        shown = f" (default: {option.default})" if option.default not in ("", 0, ()) else ""
        if option.name == "port":
            shown = f" (default: {option.default})"
        names = "{" + ",".join(c for c in option.choices if c) + "}"
        self.flag(
            option.flag,
            dest=option.name,
            metavar=names if option.choices else option.metavar,
            action="append" if isinstance(option.default, tuple) else "store",
            default=argparse.SUPPRESS,
            help=option.help.replace("%", "%%") + shown,
        )

    def flags(self, argv: Sequence[str]) -> Flags:
        """What was given. Raises UsageError naming an unknown flag and the one that was meant."""
        for word in argv:  # argparse would complain of its value first
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in self._known:
                close = difflib.get_close_matches(flag, self._known, 1)
                hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
                raise UsageError(f"there is no flag {flag}; {hint}")
            if flag.startswith("-") and flag[1:2].isalpha() and flag[:2] not in self._known:
                raise UsageError(f"there is no flag {flag}; see {self.prog} --help")
        return vars(self.parse_args(argv))


_HOME = next(option for option in OPTIONS if option.name == "home")


def _place(flags: Mapping[str, Any]) -> Path:
    """The data directory. Raises UsageError."""
    return datadir.folder(flags.get("home") or os.environ.get(_HOME.variable, ""))


# -- serve -------------------------------------------------------------------------------------------


def _serve(argv: Sequence[str]) -> int:
    parser = _Parser(about=_ABOUT, examples=_EXAMPLES)
    parser.add_argument(
        "command", nargs="?", metavar="serve", default="serve", help="what to do; the default"
    )
    parser.flag("--version", action="version", version=f"tinyoai {__version__}")
    for option in OPTIONS:
        parser.option(option)
    flags = parser.flags(argv)
    command = flags.pop("command")
    if command in COMMANDS and command != "serve":
        raise UsageError(f"{command} comes first: tinyoai {command} ...")
    if command != "serve":
        close = difflib.get_close_matches(command, COMMANDS, 1)
        hint = (
            f"did you mean {close[0]}?"
            if close
            else "tinyoai --help has them all; a model file is --model FILE"
        )
        raise UsageError(f"there is no command {command!r}; {hint}")
    file = _file(flags)
    config = resolve(flags, os.environ, file)
    from tinyoai.app import run  # late: --help and a wrong flag need no event loop

    try:
        return run(config)
    except UsageError as error:
        raise blame(error, flags, os.environ, file) from None


def _file(flags: Mapping[str, Any]) -> Stored | None:
    """What the configuration file sets; None for a user without a data directory."""
    try:
        place = _place(flags)
    except UsageError:
        return None
    return config_file.read(place)


# -- status ------------------------------------------------------------------------------------------


def _status(argv: Sequence[str]) -> int:
    return _show("status", "Shows the running servers of this data directory.", argv, agent_alone=False)


def _show(command: str, about: str, argv: Sequence[str], *, agent_alone: bool) -> int:
    parser = _Parser(command, about=about, examples=_STATUS.replace("tinyoai status", f"tinyoai {command}"))
    parser.option(_HOME)
    parser.flag(
        "--json", action="store_true", help="a JSON list of the servers, sizes in bytes, times in seconds"
    )
    flags = parser.flags(argv)
    from tinyoai.cli import agent, status
    from tinyoai.host import instances

    place = _place(flags).absolute()
    process = agent.current(place)
    servers = [server for server in instances.servers(place) if not agent_alone or server.process == process]
    said = [status.facts(server, place, process) for server in servers]
    if flags["json"]:
        import json

        print(json.dumps(said, indent=2))
    else:
        print("\n\n".join(status.table(one) for one in said), end="\n" if said else "")
    if said:
        return 0
    if process is not None:
        raise UsageError(f"the agent (pid {process.pid}) is starting; see tinyoai agent logs", exit_code=3)
    what = "no agent is running" if agent_alone else "no server is running"
    raise UsageError(f"{what}; start one with: tinyoai agent start", exit_code=3)


# -- get, set, unset ---------------------------------------------------------------------------------


def _get(argv: Sequence[str]) -> int:
    about = (
        "Shows what a server would be started with: the configuration file, the environment and the defaults."
    )
    parser = _Parser("get", about=about, examples=_GET)
    parser.add_argument(
        "names", nargs="*", metavar="key", help="a key such as http.port, or a group such as http"
    )
    parser.option(_HOME)
    parser.flag("--json", action="store_true", help="a JSON object: of each key its value and its source")
    flags = parser.flags(argv)
    options, alone = config_file.choose(flags["names"])
    place = _place(flags).absolute()
    file = config_file.read(place)
    rows = []
    for option in options:
        value, source = config_file.holds(option, os.environ, file)
        if option is _HOME:
            value, source = str(place), _HOME.flag if flags.get("home") else source
        rows.append((option, value, source))
    if flags["json"]:
        import json

        shown = {o.key: {"value": config_file.shown(o, v), "source": s or "default"} for o, v, s in rows}
        print(json.dumps(shown, indent=2))
    elif alone:
        print(config_file.plain(rows[0][0], rows[0][1]))
    else:
        wide = max(len(option.key) for option, _, _ in rows)
        broad = max(
            (len(config_file.plain(option, value)) for option, value, source in rows if source), default=0
        )
        for option, value, source in rows:
            text = config_file.plain(option, value)
            print(f"{option.key:<{wide}}  {f'{text:<{broad}}  {source}' if source else text}".rstrip())
    return 0


def _set(argv: Sequence[str]) -> int:
    parser = _Parser("set", about="Changes the configuration file.", examples=_SET)
    parser.add_argument("pairs", nargs="+", metavar="key=value", help="tinyoai get shows the keys")
    parser.option(_HOME)
    flags = parser.flags(argv)
    place = _place(flags).absolute()

    def check(config: Config) -> None:
        from tinyoai.app import check  # late: it takes a server's imports

        check(config)

    changes = config_file.change(place, flags["pairs"], check)
    for option, value in changes:
        print(f"{option.key} = {config_file.plain(option, value)}")
        if os.environ.get(option.variable):
            print(f"tinyoai: {option.variable} is set here and wins over the file", file=sys.stderr)
    _say_when(place, [option for option, _ in changes])
    return 0


def _unset(argv: Sequence[str]) -> int:
    parser = _Parser("unset", about="Takes keys off the configuration file.", examples=_UNSET)
    parser.add_argument("names", nargs="+", metavar="key", help="tinyoai get shows the keys")
    parser.option(_HOME)
    flags = parser.flags(argv)
    place = _place(flags).absolute()
    gone = config_file.remove(place, flags["names"])
    print(f"no longer set: {', '.join(gone)}" if gone else "none of that was set")
    if gone:
        _say_when(place, [option for option in OPTIONS if option.key in gone])
    return 0


def _say_when(place: Path, changed: Sequence[Option]) -> None:
    """What must be done for a change to take effect."""
    from tinyoai.cli import agent
    from tinyoai.host import instances

    process = agent.current(place)
    known = agent.note(place)
    if process is not None and known is not None:
        held = [option.flag for option in changed if option.name in known.flags]
        if held:  # a restart keeps its flags, and they win over the file
            print(f"the agent was started with {' and '.join(held)}, and a flag wins over the file")
            print("it takes effect after: tinyoai agent stop, and tinyoai agent start without that flag")
        else:
            print("it takes effect after: tinyoai agent restart")
    for server in instances.servers(place):
        if server.process != process:
            print(f"{server.server} (pid {server.process.pid}) takes it when that server is started again")


# -- agent -------------------------------------------------------------------------------------------


def _agent(argv: Sequence[str]) -> int:
    if argv[:1] in (["--help"], ["-h"]):
        print(_AGENT, end="")
        return 0
    action = argv[0] if argv else ""
    if action not in ACTIONS:
        close = difflib.get_close_matches(action, ACTIONS, 1)
        hint = f"did you mean {close[0]}?" if close else f"it is one of {', '.join(ACTIONS)}"
        raise UsageError(f"tinyoai agent {action}: {hint}" if action else f"tinyoai agent does what? {hint}")
    return ACTIONS[action](argv[1:])


def _agent_flags(command: str, about: str, examples: str, argv: Sequence[str]) -> Flags:
    parser = _Parser(command, about=about, examples=examples)
    for option in OPTIONS:
        parser.option(option)
    return parser.flags(argv)


def _start(argv: Sequence[str]) -> int:
    flags = _agent_flags("agent start", "Starts the server in the background.", _START, argv)
    return _begin(_place(flags), flags)


def _restart(argv: Sequence[str]) -> int:
    about = "Stops the server in the background, if it runs, and starts it anew."
    flags = _agent_flags("agent restart", about, _RESTART, argv)
    place = _place(flags)
    from tinyoai.cli import agent

    known = agent.note(place)
    if known is not None and not flags.keys() - {"home"}:
        flags = {**known.flags, **flags}
    config = resolve(flags, os.environ, config_file.read(place))  # before the old one is stopped for it
    if known is not None and known.keyed and not (config.api_key or config.api_key_file):
        raise UsageError(
            "the agent was given API keys, which are not remembered: give them again by TINYOAI_API_KEY or "
            "--api-key-file, or start it without any by tinyoai agent stop and tinyoai agent start",
            exit_code=1,
        )
    if agent.current(place) is not None:
        print(agent.stop(place), flush=True)
    return _begin(place, flags)


def _begin(place: Path, flags: Flags) -> int:
    """Starts the agent and says where it is."""
    config = resolve(flags, os.environ, config_file.read(place))
    passed: dict[str, Text] = {}
    variables: dict[str, str] = {}
    for option in OPTIONS:
        if option.path and os.environ.get(option.variable):  # its folder is another
            variables[option.variable] = os.path.abspath(os.environ[option.variable])
        if option.name in flags and option not in (_HOME, _KEY):
            text = flags[option.name]
            passed[option.name] = os.path.abspath(text) if option.path and text else text
    if _KEY.name in flags:
        variables[_KEY.variable] = ",".join(config.api_key)
    keyed = bool(os.environ.get(_KEY.variable) or variables.keys() & {_KEY.variable, "TINYOAI_API_KEY_FILE"})
    from tinyoai.cli import agent

    server, anew = agent.start(place, passed, variables, keyed=keyed, patience=config.load_timeout)
    if anew:
        print(f"the agent is ready (pid {server.process.pid})")
        print(f"  base URL  {server.base_url}\n  model     {server.model}\n  docs      {server.server}/docs")
    else:
        hint = "; tinyoai agent restart gives it these flags" if flags.keys() - {"home"} else ""
        print(f"the agent is running already (pid {server.process.pid}): {server.base_url}{hint}")
    return 0


_KEY = next(option for option in OPTIONS if option.name == "api_key")


def _stop(argv: Sequence[str]) -> int:
    parser = _Parser("agent stop", about="Ends the server in the background.", examples=_STOP)
    parser.option(_HOME)
    flags = parser.flags(argv)
    from tinyoai.cli import agent

    print(agent.stop(_place(flags)))
    return 0


def _agent_status(argv: Sequence[str]) -> int:
    return _show("agent status", "Shows the server in the background.", argv, agent_alone=True)


def _logs(argv: Sequence[str]) -> int:
    parser = _Parser("agent logs", about="Shows what the server in the background printed.", examples=_LOGS)
    parser.flag(
        "-n", "--lines", type=int, default=50, metavar="N", help="how many of the last lines (default: 50)"
    )
    parser.flag("-f", "--follow", action="store_true", help="go on with what is added, until Ctrl-C")
    parser.option(_HOME)
    flags = parser.flags(argv)
    if flags["lines"] < 0:
        raise UsageError("-n: it must be 0 or more")
    from tinyoai.cli import agent

    for data in agent.logs(_place(flags), flags["lines"], follow=flags["follow"]):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    return 0


Command = Callable[[Sequence[str]], int]

COMMANDS: dict[str, Command] = {
    "serve": _serve,
    "status": _status,
    "agent": _agent,
    "get": _get,
    "set": _set,
    "unset": _unset,
}
ACTIONS: dict[str, Command] = {
    "start": _start,
    "stop": _stop,
    "restart": _restart,
    "status": _agent_status,
    "logs": _logs,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
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
