"""The commands `get`, `set` and `unset`: show and change the configuration file."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyoai.cli import help as texts
from tinyoai.cli.parser import HOME, Parser, data_dir
from tinyoai.config import config_file
from tinyoai.config.options import OPTIONS, Config, Option


def run_get(argv: Sequence[str]) -> int:
    """Prints the values that a server without flags would use, and their sources."""
    about = "Shows what a server without flags would use: the configuration file, the environment and the defaults."
    parser = Parser("get", about=about, examples=texts.GET)
    parser.add_argument(
        "names", nargs="*", metavar="key", help="a key such as http.port, or a group such as http"
    )
    parser.add_option(HOME)
    parser.add_flag("--json", action="store_true", help="print a JSON object: value and source of each key")
    flags = parser.flags(argv)
    options, is_one_key = config_file.select(flags["names"])
    folder = data_dir(flags)
    file = config_file.read(folder)
    rows = []
    for option in options:
        value, source = config_file.effective(option, os.environ, file)
        if option is HOME:
            value, source = str(folder), HOME.flag if flags.get("home") else source
        rows.append((option, value, source))
    if flags["json"]:
        import json

        values = {o.key: {"value": config_file.displayed(o, v), "source": s or "default"} for o, v, s in rows}
        print(json.dumps(values, indent=2))
        return 0
    texts_and_sources = [(o.key, config_file.one_line(o, v), s) for o, v, s in rows]
    if is_one_key:
        print(texts_and_sources[0][1])
        return 0
    key_width = max(len(key) for key, _, _ in texts_and_sources)
    value_width = max((len(text) for _, text, source in texts_and_sources if source), default=0)
    for key, text, source in texts_and_sources:
        value_and_source = f"{text:<{value_width}}  {source}" if source else text
        print(f"{key:<{key_width}}  {value_and_source}".rstrip())
    return 0


def run_set(argv: Sequence[str]) -> int:
    """Writes values to the configuration file."""
    parser = Parser("set", about="Changes the configuration file.", examples=texts.SET)
    parser.add_argument("pairs", nargs="+", metavar="key=value", help="tinyoai get shows the keys")
    parser.add_option(HOME)
    flags = parser.flags(argv)
    folder = data_dir(flags)

    def check(config: Config) -> None:
        from tinyoai.app import check  # late: it imports the server

        check(config)

    changes = config_file.set_values(folder, flags["pairs"], check)
    for option, value in changes:
        print(f"{option.key} = {config_file.one_line(option, value)}")
        if os.environ.get(option.variable):
            print(f"tinyoai: {option.variable} is set and overrides the file", file=sys.stderr)
    _print_how_to_apply(folder, [option for option, _ in changes])
    return 0


def run_unset(argv: Sequence[str]) -> int:
    """Removes keys from the configuration file."""
    parser = Parser("unset", about="Removes keys from the configuration file.", examples=texts.UNSET)
    parser.add_argument("names", nargs="+", metavar="key", help="tinyoai get shows the keys")
    parser.add_option(HOME)
    flags = parser.flags(argv)
    folder = data_dir(flags)
    removed = config_file.unset_values(folder, flags["names"])
    print(f"removed: {', '.join(removed)}" if removed else "none of these keys was set")
    if removed:
        _print_how_to_apply(folder, [option for option in OPTIONS if option.key in removed])
    return 0


def _print_how_to_apply(folder: Path, changed: Sequence[Option]) -> None:
    """Prints which running servers must be restarted for a change to take effect, and how."""
    from tinyoai.cli import agent
    from tinyoai.host import instances

    process = agent.current(folder)
    record = agent.read_record(folder)
    if process is not None and record is not None:
        # a restart keeps the agent's flags, which override the file
        overriding = [option.flag for option in changed if option.name in record.flags]
        if overriding:
            print(f"the agent was started with {' and '.join(overriding)}, which overrides the file")
            print("to apply: tinyoai agent stop, then tinyoai agent start without that flag")
        else:
            print("to apply: tinyoai agent restart")
    for server in instances.servers(folder):
        if server.process != process:
            print(f"to apply to {server.url} (pid {server.process.pid}): restart that server")
