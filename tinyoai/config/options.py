"""What can be set, once: name, type, bounds, default and help of every option.

Owns the order flags > environment (TINYOAI_*) > configuration file > defaults, the file's form and the checks.
`cli` makes flags of OPTIONS, so an option added here is a flag, a variable, a key of the file and a line of
help. It must not know what the values are used for, nor where the file is.
"""

import difflib
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from tinyoai.errors import UsageError
from tinyoai.units import MAX_SECONDS, seconds, size

__all__ = ["MAX_SECONDS", "seconds", "size"]

ENGINES = ("ctransformers", "fake")
MODEL_TYPES = ("dolly-v2", "falcon", "gpt2", "gptj", "gptneox", "llama", "mpt", "replit", "starcoder")
TEMPLATES = ("auto", "chatml", "llama2", "mistral", "zephyr", "vicuna", "alpaca", "plain")
POOLINGS = ("auto", "mean", "weighted-mean", "last")
LOG_LEVELS = ("debug", "info", "warning", "error")
DEFAULT_CONTEXT = 4096
"""Tokens: the most that a model gets where nobody says more."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set. Empty strings and zeros mean: tinyoai chooses."""

    host: str
    port: int
    model: str
    model_type: str
    model_name: str
    models_dir: str
    memory_budget: str
    keep_alive: str
    home: str
    ctx_size: int
    threads: int
    parallel: int
    batch_size: int
    gpu_layers: int
    chat_template: str
    pooling: str
    engine: str
    max_body: int
    max_queue: int
    queue_timeout: float
    api_key: tuple[str, ...]
    api_key_file: str
    rate_limit: str
    cors_origin: tuple[str, ...]
    allowed_host: tuple[str, ...]
    grace: float
    load_timeout: float
    log_level: str


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One option; `name` is its name in Config, with dashes its flag."""

    name: str
    key: str
    """Its name in the configuration file: a group, a dot, and what it is called there."""
    default: str | int | float | tuple[str, ...]
    """A tuple: the flag may be given several times, the variable separates by commas."""
    help: str
    metavar: str = ""
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    path: bool = False
    """A file or folder: what is remembered of it is its whole path."""

    @property
    def flag(self) -> str:
        """The command line's spelling."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment's spelling."""
        return "TINYOAI_" + self.name.upper()


OPTIONS: tuple[Option, ...] = (
    Option(
        name="host",
        key="http.host",
        default="127.0.0.1",
        metavar="ADDR",
        help="address to listen on; 0.0.0.0 lets other machines in",
    ),
    Option(
        name="port",
        key="http.port",
        default=8000,
        metavar="N",
        low=0,
        high=65535,
        help="port to listen on; 0 picks a free one and prints it",
    ),
    Option(
        name="model",
        key="model.file",
        path=True,
        default="",
        metavar="FILE",
        help="a GGUF file, or a legacy GGML file with --model-type; without it the built-in model is served",
    ),
    Option(
        name="model_type",
        key="model.type",
        default="",
        choices=("", *MODEL_TYPES),
        help="architecture of a legacy GGML file, which does not say it itself",
    ),
    Option(
        name="model_name",
        key="model.name",
        default="",
        metavar="NAME",
        help="the id that clients use for the model; without it the file's name",
    ),
    Option(
        name="models_dir",
        key="models.dir",
        path=True,
        default="",
        metavar="FOLDER",
        help="serve every GGUF file in this folder and below it too, loaded when asked for",
    ),
    Option(
        name="memory_budget",
        key="models.memory-budget",
        default="",
        metavar="SIZE",
        help="what all loaded models may take together, such as 4G; without it nine tenths of what can be had",
    ),
    Option(
        name="keep_alive",
        key="models.keep-alive",
        default="-1",
        metavar="TIME",
        help="how long a model stays loaded without a request, such as 300 or 5m; 0 not at all, -1 for ever",
    ),
    Option(
        name="home",
        key="home",
        path=True,
        default="",
        metavar="FOLDER",
        help="folder of the configuration file, of the registry of models and of the agent's files; "
        "without it ~/.local/share/tinyoai",
    ),
    Option(
        name="ctx_size",
        key="model.ctx-size",
        default=0,
        metavar="N",
        low=0,
        high=1 << 20,
        help="context window in tokens; 0 takes the model's own, at most 4096",
    ),
    Option(
        name="threads",
        key="model.threads",
        default=0,
        metavar="N",
        low=0,
        high=256,
        help="threads for one evaluation; 0 measures what is fastest",
    ),
    Option(
        name="parallel",
        key="model.parallel",
        default=4,
        metavar="N",
        low=1,
        high=30,
        help="requests decoded at the same time; each keeps a KV cache of its own",
    ),
    Option(
        name="batch_size",
        key="model.batch-size",
        default=32,
        metavar="N",
        low=1,
        high=512,
        help="prompt tokens evaluated at once; a cancel waits for at most so many",
    ),
    Option(
        name="gpu_layers",
        key="model.gpu-layers",
        default=0,
        metavar="N",
        low=0,
        high=1000,
        help="layers to put on a GPU, where the engine's library has one",
    ),
    Option(
        name="chat_template",
        key="model.chat-template",
        default="auto",
        choices=TEMPLATES,
        help="how messages become a prompt; auto reads it from the model",
    ),
    Option(
        name="pooling",
        key="model.pooling",
        default="auto",
        choices=POOLINGS,
        help="how a text's token states become its embedding; auto reads it from the model",
    ),
    Option(
        name="engine",
        key="model.engine",
        default="ctransformers",
        choices=ENGINES,
        help="what evaluates the model; fake needs none and repeats what it is told",
    ),
    Option(
        name="max_body",
        key="http.max-body",
        default=4 << 20,
        metavar="BYTES",
        low=1024,
        high=1 << 30,
        help="largest request body",
    ),
    Option(
        name="max_queue",
        key="access.max-queue",
        default=32,
        metavar="N",
        low=0,
        high=100_000,
        help="requests that may wait for a slot; more are told to try again",
    ),
    Option(
        name="queue_timeout",
        key="access.queue-timeout",
        default=300.0,
        metavar="SECONDS",
        low=0.001,
        high=86_400,
        help="how long a request may wait for a slot before it is answered with 408",
    ),
    Option(
        name="api_key",
        key="access.api-key",
        default=(),
        metavar="KEY",
        help="ask clients for this key; may be given several times (a file or the environment hides it better)",
    ),
    Option(
        name="api_key_file",
        key="access.api-key-file",
        path=True,
        default="",
        metavar="FILE",
        help="ask clients for a key of this file: one on each line, and after a blank its owner's name",
    ),
    Option(
        name="rate_limit",
        key="access.rate-limit",
        default="",
        metavar="N[,TOKENS]",
        help="requests, and tokens, a minute for each key, or without keys for each address",
    ),
    Option(
        name="cors_origin",
        key="http.cors-origin",
        default=(),
        metavar="ORIGIN",
        help="let pages of this origin (https://app.example, or *) use the server from a browser; may be repeated",
    ),
    Option(
        name="allowed_host",
        key="http.allowed-host",
        default=(),
        metavar="NAME",
        help="a further name by which a server on a loopback address may be called; may be repeated",
    ),
    Option(
        name="grace",
        key="http.grace",
        default=20.0,
        metavar="SECONDS",
        low=0,
        high=86_400,
        help="how long running answers may take to finish when told to stop",
    ),
    Option(
        name="load_timeout",
        key="models.load-timeout",
        default=300.0,
        metavar="SECONDS",
        low=1,
        high=86_400,
        help="how long loading the model may take",
    ),
    Option(
        name="log_level",
        key="log.level",
        default="info",
        choices=LOG_LEVELS,
        help="how much is logged to stderr",
    ),
)


Text = str | Sequence[str]
"""A value as it was given, before the checks; several for an option that may be repeated."""


class Stored(NamedTuple):
    """What a configuration file sets, by the option's name."""

    path: str
    values: Mapping[str, Text]


class Given(NamedTuple):
    """A value that somebody gave, and where."""

    text: Text
    source: str
    """The flag, the variable, or the key and its file: what a complaint begins with."""
    exit_code: int = 2


def given(
    option: Option, flags: Mapping[str, Text], environment: Mapping[str, str], stored: Stored | None = None
) -> Given | None:
    """The value that holds for an option, flags over environment over file; None: its default."""
    if option.name in flags:
        return Given(flags[option.name], option.flag)
    if environment.get(option.variable):
        return Given(environment[option.variable], option.variable)
    if stored is not None and option.name in stored.values:
        return Given(stored.values[option.name], f"{option.key} in {stored.path}", 1)
    return None


def resolve(
    flags: Mapping[str, Text], environment: Mapping[str, str], stored: Stored | None = None
) -> Config:
    """Flags over environment over file over defaults, checked.

    Raises UsageError naming where a value came from; its exit code is 1 for the file.
    """
    values: dict[str, Any] = {}
    for option in OPTIONS:
        found = given(option, flags, environment, stored)
        values[option.name] = option.default if found is None else parse(option, found)
    return Config(**values)


def blame(
    error: UsageError, flags: Mapping[str, Text], environment: Mapping[str, str], stored: Stored | None
) -> UsageError:
    """A complaint that begins with a flag, as of the variable or the file where that value came from."""
    for option in OPTIONS:
        if str(error).startswith(option.flag + ":"):
            found = given(option, flags, environment, stored)
            if found is not None:
                return UsageError(
                    found.source + str(error).removeprefix(option.flag),
                    exit_code=min(found.exit_code, error.exit_code),
                )
    return error


# -- the configuration file --------------------------------------------------------------------------


def find(name: str, otherwise: str = "tinyoai get shows all there are") -> Option:
    """The option of a key such as http.port; its plain name does as well.

    Raises UsageError with the nearest, or with `otherwise` where nothing is near.
    """
    wanted = name.strip().lower().replace("_", "-")
    names: dict[str, Option] = {}
    for option in OPTIONS:
        plain = option.flag.removeprefix("--")
        names |= {plain: option, f"{group(option)}.{plain}": option}
    names |= {option.key: option for option in OPTIONS}
    if wanted in names:
        return names[wanted]
    close = difflib.get_close_matches(wanted, names, 1)
    hint = f"did you mean {names[close[0]].key}?" if close else otherwise
    raise UsageError(f"there is no setting {name!r}; {hint}")


def group(option: Option) -> str:
    """The first part of an option's key."""
    return option.key.partition(".")[0]


def decode(data: bytes, path: str) -> dict[str, Any]:
    """A configuration file's keys, unchecked. Raises UsageError if it is no JSON object."""
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError) as error:
        raise UsageError(
            f"the configuration file {path} is damaged: {error}; mend it, or move it away", exit_code=1
        ) from None


def stored(settings: Mapping[str, Any], path: str) -> Stored:
    """What a configuration file's keys set. Raises UsageError naming file and key."""
    values: dict[str, Text] = {}
    for key, value in settings.items():
        try:
            # get could not show them: it reads this file, too
            option = find(key, f"tinyoai unset {shlex.quote(key)} takes it off")
        except UsageError as error:
            raise UsageError(f"the configuration file {path}: {error}", exit_code=1) from None
        where = f"{key} in {path}"
        if option.name == "home":
            raise UsageError(f"{where}: that is where this file is; use --home or TINYOAI_HOME", exit_code=1)
        if option.name in values:
            raise UsageError(f"{where}: it is set twice, under two names", exit_code=1)
        values[option.name] = _text(option, value, where)
    return Stored(path, values)


def _text(option: Option, value: object, where: str) -> Text:
    if isinstance(option.default, tuple) and isinstance(value, list) and all(type(v) is str for v in value):
        return tuple(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        kind = "a text or a list of texts" if isinstance(option.default, tuple) else "a text or a number"
        raise UsageError(f"{where}: it must be {kind}", exit_code=1)
    if option.path and value:
        value = os.path.expanduser(value)
        if not os.path.isabs(value):
            raise UsageError(f"{where}: {value!r} is no whole path; it must begin with /", exit_code=1)
    return value


def parse(option: Option, found: Given) -> str | int | float | tuple[str, ...]:
    """A value of the option's type. Raises UsageError for one that is of another, or out of bounds."""
    if isinstance(option.default, tuple):
        texts = [found.text] if isinstance(found.text, str) else found.text
        parts = tuple(part.strip() for text in texts for part in text.split(",") if part.strip())
        if not parts:  # as from --api-key "$KEY" without a KEY: that must not open the door
            raise UsageError(
                f"{found.source}: it is empty; give it a value or leave it out", exit_code=found.exit_code
            )
        return parts
    try:
        return _parse(option, str(found.text), found.source)
    except UsageError as error:
        raise UsageError(str(error), exit_code=found.exit_code) from None


def _parse(option: Option, text: str, source: str) -> str | int | float:
    if isinstance(option.default, str):
        if option.choices and text not in option.choices:
            raise UsageError(f"{source}: {text!r} is not one of {', '.join(c for c in option.choices if c)}")
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
