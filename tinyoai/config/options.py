"""The option table: name, type, bounds, default and help of every setting.

An option added to OPTIONS and Config is a flag, a TINYOAI_* variable, a key of the configuration file and a line
of help.
"""

import msgspec

from tinyoai.errors import UsageError
from tinyoai.text import chat_format

ENGINES = ("auto", "ctransformers", "llamacpp", "fake")
MODEL_TYPES = ("dolly-v2", "falcon", "gpt2", "gptj", "gptneox", "llama", "mpt", "replit", "starcoder")
TEMPLATES = ("auto", *chat_format.NAMES)
POOLINGS = ("auto", "mean", "weighted-mean", "last", "cls")
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
LOG_LEVELS = ("debug", "info", "warning", "error")

Value = str | int | float | bool | tuple[str, ...]


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All settings, parsed and checked. Empty strings and zeros mean: tinyoai chooses."""

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
    cache_type_k: str
    cache_type_v: str
    flash_attn: str
    no_mmap: bool
    mlock: bool
    kv: str
    cache_ram: str
    cache_disk: str
    cache_shared: bool
    reproducible: bool
    lora: tuple[str, ...]
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
    """One option. `name` is its name in Config; with dashes it is the flag."""

    name: str
    key: str
    """Its key in the configuration file: group.name."""
    default: Value
    """A tuple: the flag may be repeated, and the variable is a comma-separated list. A bool: the flag has no value."""
    help: str
    metavar: str = ""
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    path: bool = False
    """A file or folder: it is stored as an absolute path. With `choices`: one of these, or a file."""

    def is_path(self, text: str) -> bool:
        """Whether a value of this option is a path."""
        return self.path and bool(text) and text not in self.choices

    @property
    def flag(self) -> str:
        """The command line flag, such as --ctx-size."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable, such as TINYOAI_CTX_SIZE."""
        return "TINYOAI_" + self.name.upper()


OPTIONS: tuple[Option, ...] = (
    Option(
        name="host",
        key="http.host",
        default="127.0.0.1",
        metavar="ADDR",
        help="address to listen on; 0.0.0.0 accepts connections from other machines",
    ),
    Option(
        name="port",
        key="http.port",
        default=8000,
        metavar="N",
        low=0,
        high=65535,
        help="port to listen on; 0 picks a free port and prints it",
    ),
    Option(
        name="model",
        key="model.file",
        path=True,
        default="",
        metavar="FILE",
        help="a GGUF file, or a legacy GGML file with --model-type (default: the built-in model)",
    ),
    Option(
        name="model_type",
        key="model.type",
        default="",
        choices=("", *MODEL_TYPES),
        help="architecture of a legacy GGML file, whose header does not name it",
    ),
    Option(
        name="model_name",
        key="model.name",
        default="",
        metavar="NAME",
        help="model id for clients (default: the file's name)",
    ),
    Option(
        name="models_dir",
        key="models.dir",
        path=True,
        default="",
        metavar="FOLDER",
        help="also serve every GGUF file in this folder and below it; each loads on its first request",
    ),
    Option(
        name="memory_budget",
        key="models.memory-budget",
        default="",
        metavar="SIZE",
        help="memory limit for all loaded models together, such as 4G (default: nine tenths of what is available)",
    ),
    Option(
        name="keep_alive",
        key="models.keep-alive",
        default="-1",
        metavar="TIME",
        help="how long an idle model stays loaded, such as 300 or 5m; 0 unloads at once, -1 never",
    ),
    Option(
        name="home",
        key="home",
        path=True,
        default="",
        metavar="FOLDER",
        help="data directory: configuration file, model registry, fine-tuning jobs and the agent's files "
        "(default: ~/.local/share/tinyoai)",
    ),
    Option(
        name="ctx_size",
        key="model.ctx-size",
        default=0,
        metavar="N",
        low=0,
        high=1 << 20,
        help="context window in tokens; 0 takes the model's own, at most 32768 (ctransformers: 4096), less where a "
        "quarter of the memory cannot hold it",
    ),
    Option(
        name="threads",
        key="model.threads",
        default=0,
        metavar="N",
        low=0,
        high=256,
        help="threads for one evaluation, less while several models work; 0 measures which number is fastest",
    ),
    Option(
        name="parallel",
        key="model.parallel",
        default=0,
        metavar="N",
        low=0,
        high=64,
        help="slots: requests decoded at the same time; 0 takes 4 to 16, as memory allows",
    ),
    Option(
        name="batch_size",
        key="model.batch-size",
        default=0,
        metavar="N",
        low=0,
        high=512,
        help="prompt tokens of one request evaluated per step; 0 takes the engine's own: 512 for llamacpp, less on "
        "small devices and beside other answers; 32 for ctransformers",
    ),
    Option(
        name="cache_type_k",
        key="model.cache-type-k",
        default="f16",
        choices=CACHE_TYPES,
        help="how llamacpp stores the keys of its KV cache; q8_0 takes about half of the memory, q4_0 a quarter",
    ),
    Option(
        name="cache_type_v",
        key="model.cache-type-v",
        default="f16",
        choices=CACHE_TYPES,
        help="how llamacpp stores the values of its KV cache; a quantized type needs flash attention",
    ),
    Option(
        name="flash_attn",
        key="model.flash-attn",
        default="auto",
        choices=("auto", "on", "off"),
        help="flash attention of llamacpp, which takes less memory; auto turns it on where the model allows it",
    ),
    Option(
        name="no_mmap",
        key="model.no-mmap",
        default=False,
        help="llamacpp reads the model file into memory of its own instead of mapping it",
    ),
    Option(
        name="mlock",
        key="model.mlock",
        default=False,
        help="llamacpp keeps the weights in RAM, so that the system does not swap them out",
    ),
    Option(
        name="kv",
        key="model.kv",
        default="auto",
        choices=("auto", "unified", "separate"),
        help="how llamacpp divides its KV cache: unified lets one long conversation use all of it, separate gives each "
        "slot an equal part and is faster with many short ones; auto chooses by the model",
    ),
    Option(
        name="cache_ram",
        key="model.cache-ram",
        default="",
        metavar="SIZE",
        help="host memory of each llamacpp model for conversations that have no slot, such as 512M; 0: none (default: "
        "an eighth of the memory budget, at most 1G)",
    ),
    Option(
        name="cache_disk",
        key="model.cache-disk",
        default="2G",
        metavar="SIZE",
        help="disk space for conversations of llamacpp models, so that they survive a restart; 0: none",
    ),
    Option(
        name="cache_shared",
        key="access.cache-shared",
        default=False,
        help="clients with different API keys reuse each other's prompts, and can tell by the time that a prompt was "
        "sent before",
    ),
    Option(
        name="reproducible",
        key="model.reproducible",
        default=False,
        help="llamacpp gives the same answer to the same request with temperature 0 or a seed, in any company; slower",
    ),
    Option(
        name="lora",
        key="model.lora",
        default=(),
        metavar="FILE[=SCALE]",
        help="LoRA adapter of the model, a GGUF file; may be repeated (SCALE: the factor of its changes, default 1)",
    ),
    Option(
        name="gpu_layers",
        key="model.gpu-layers",
        default=0,
        metavar="N",
        low=0,
        high=1000,
        help="layers to put on a GPU; the llamacpp engine of this version runs on processors only",
    ),
    Option(
        name="chat_template",
        key="model.chat-template",
        default="auto",
        choices=TEMPLATES,
        path=True,
        metavar="{" + ",".join(TEMPLATES) + "} or FILE",
        help="chat template: a known format, or a file with a Jinja template; auto reads it from the model file",
    ),
    Option(
        name="pooling",
        key="model.pooling",
        default="auto",
        choices=POOLINGS,
        help="how token states become an embedding; auto reads it from the model file",
    ),
    Option(
        name="engine",
        key="model.engine",
        default="auto",
        choices=ENGINES,
        help="inference engine; auto picks it by the model file and by what is installed, fake needs no model and "
        "echoes messages",
    ),
    Option(
        name="max_body",
        key="http.max-body",
        default=4 << 20,
        metavar="BYTES",
        low=1024,
        high=1 << 30,
        help="largest request body in bytes",
    ),
    Option(
        name="max_queue",
        key="access.max-queue",
        default=32,
        metavar="N",
        low=0,
        high=100_000,
        help="requests that may wait for a slot; further ones get 429",
    ),
    Option(
        name="queue_timeout",
        key="access.queue-timeout",
        default=300.0,
        metavar="SECONDS",
        low=0.001,
        high=86_400,
        help="how long a request may wait for a slot before it gets 408",
    ),
    Option(
        name="api_key",
        key="access.api-key",
        default=(),
        metavar="KEY",
        help="require this API key; may be repeated (--api-key-file and TINYOAI_API_KEY hide it from other users)",
    ),
    Option(
        name="api_key_file",
        key="access.api-key-file",
        path=True,
        default="",
        metavar="FILE",
        help="require an API key from this file: one key on each line, optionally a space and its owner's name",
    ),
    Option(
        name="rate_limit",
        key="access.rate-limit",
        default="",
        metavar="N[,TOKENS]",
        help="requests, and tokens, per minute for each key, or for each address if there are no keys",
    ),
    Option(
        name="cors_origin",
        key="http.cors-origin",
        default=(),
        metavar="ORIGIN",
        help="allow pages of this origin: https://app.example, chrome-extension://ID, or * for any; may be repeated",
    ),
    Option(
        name="allowed_host",
        key="http.allowed-host",
        default=(),
        metavar="NAME",
        help="further Host name accepted on a loopback address; may be repeated",
    ),
    Option(
        name="grace",
        key="http.grace",
        default=20.0,
        metavar="SECONDS",
        low=0,
        high=86_400,
        help="how long running answers may take to finish when the server stops",
    ),
    Option(
        name="load_timeout",
        key="models.load-timeout",
        default=300.0,
        metavar="SECONDS",
        low=1,
        high=86_400,
        help="how long loading a model may take",
    ),
    Option(
        name="log_level",
        key="log.level",
        default="info",
        choices=LOG_LEVELS,
        help="lowest level logged to stderr",
    ),
)


def find(name: str, hint: str = "tinyoai get lists all keys") -> Option:
    """The option of a key such as http.port, of its name without the group, or of its flag's name.

    Raises UsageError that suggests the nearest key, or says `hint` if none is near.
    """
    wanted = name.strip().lower().replace("_", "-")
    names: dict[str, Option] = {}
    for option in OPTIONS:
        plain = option.flag.removeprefix("--")
        names |= {plain: option, f"{group(option)}.{plain}": option}
    names |= {option.key: option for option in OPTIONS}
    if wanted in names:
        return names[wanted]
    import difflib

    close = difflib.get_close_matches(wanted, names, 1)
    raise UsageError(f"unknown key {name!r}; {f'did you mean {names[close[0]].key}?' if close else hint}")


def group(option: Option) -> str:
    """The first part of an option's key."""
    return option.key.partition(".")[0]
