"""Engines by name: which files they run and how much memory a load takes. Imports no native code.

This module and `engine/NAME/facts.py` are the only parts of `engine` that the server imports. A worker opens a
model with `engine.opening`.
"""

from collections.abc import Callable
from typing import NamedTuple

from msgspec import structs

from tinyoai import gguf, wire
from tinyoai.engine.ctransformers import facts as ctransformers
from tinyoai.engine.llamacpp import facts as llamacpp
from tinyoai.engine.memory_estimate import (
    CONTEXT_STEP,
    DEFAULT_CONTEXT,
    WORKER_BYTES,
    HParams,
    MemoryEstimate,
)

__all__ = [
    "AUTO",
    "CONTEXT_STEP",
    "DEFAULT_CONTEXT",
    "ENGINES",
    "MODEL_ENGINES",
    "PLAIN_CACHE_TYPES",
    "WORKER_BYTES",
    "EngineFacts",
    "HParams",
    "MemoryEstimate",
    "choose",
    "choose_legacy",
    "complete",
    "installed",
]

ENCODER_CONTEXT = 512
"""As DEFAULT_CONTEXT, of an encoder."""
DEFAULT_SLOTS = 4
"""Slots where nobody chose a number."""
PLAIN_CACHE_TYPES = ("f32", "f16", "bf16")
"""Types of the KV cache that need no flash attention."""
AUTO = "auto"
"""The name that stands for the best engine that runs a file."""


class EngineFacts(NamedTuple):
    """The facts of an engine that are known without loading it."""

    supports: Callable[[gguf.Header], str | None]
    """Returns the reason why the engine cannot run a file, to follow the file's name; None if it can."""
    hparams: Callable[[gguf.Header], HParams]
    """Hyperparameters of a file that `supports` accepts."""
    estimate: Callable[[HParams | None, int, wire.Load], MemoryEstimate]
    """From hyperparameters (None: not known), file size in bytes and load."""
    legacy: bool = False
    """Runs GGML files from before GGUF."""
    embeds: bool = False
    """Makes embeddings of every file that it runs; else only a load tells."""
    saves: bool = False
    """Can keep the states of finished sequences in memory and on disk."""
    n_batch: int = 32
    """Prompt tokens of a step, where nobody chose a number."""
    max_context: int = DEFAULT_CONTEXT
    """Tokens of a context window that nobody chose, if the model was trained for as many."""
    installed: Callable[[], bool] = lambda: True
    """Whether its library is there; loads no native code."""
    install: str = ""
    """The command that installs its library."""


def _no_file(header: gguf.Header) -> str:
    return "is a model file, and the fake engine runs none"


def _fake_hparams(header: gguf.Header) -> HParams:
    raise gguf.Unsupported(f"{header.path} {_no_file(header)}")


ENGINES: dict[str, EngineFacts] = {
    "ctransformers": EngineFacts(
        ctransformers.supports, ctransformers.hparams, ctransformers.estimate, legacy=True
    ),
    "llamacpp": EngineFacts(
        llamacpp.supports,
        llamacpp.hparams,
        llamacpp.estimate,
        embeds=True,
        saves=True,
        n_batch=llamacpp.N_BATCH,
        max_context=llamacpp.MAX_CONTEXT,
        installed=llamacpp.installed,
        install=llamacpp.INSTALL,
    ),
    # it reserves as much as ctransformers, so that memory budgets can be tried without loading models
    "fake": EngineFacts(_no_file, _fake_hparams, ctransformers.estimate),
}

MODEL_ENGINES = ("llamacpp", "ctransformers")
"""The engines of model files, in the order in which `choose` tries them: llama.cpp is faster and knows more files."""


def installed() -> str:
    """The engines of model files whose libraries are there, as a text; it differs when one comes or goes."""
    return "+".join(name for name in MODEL_ENGINES if ENGINES[name].installed())


def choose(header: gguf.Header, engine: str = AUTO) -> str:
    """The engine for a file: the named one, or the best that is installed and runs it.

    Raises gguf.Unsupported with the reason, or with the command that installs an engine that runs it.
    """
    names = MODEL_ENGINES if engine == AUTO else (engine,)
    reasons = {name: ENGINES[name].supports(header) for name in names}
    able = [name for name in names if reasons[name] is None]
    for name in able:
        if ENGINES[name].installed():
            return name
    if able:
        raise gguf.Unsupported(
            f"{header.path} is a {header.architecture[:40]} model, which the {able[0]} engine runs; install it with: "
            f"{ENGINES[able[0]].install}"
        )
    raise gguf.Unsupported(f"{header.path} {reasons[names[0]]}")


def complete(load: wire.Load, hparams: HParams | None, n_ctx_train: int, capacity: int) -> wire.Load:
    """The load with the engine's own choice of what is 0 in it: tokens of a step, and the context window.

    The window is the model's own within `max_context`, cut to what a quarter of `capacity` (in bytes) holds of the
    KV cache of all slots, but not below 4096 (512 for an encoder, which keeps more for each token). The machine's
    whole memory decides, not what is free now, so that every load gives the same. A model that has learned its
    positions one by one gets no more of them.
    """
    engine = ENGINES.get(load.engine)
    if engine is None:  # the worker refuses the load in words
        return load
    n_ctx = load.n_ctx
    load = structs.replace(
        load, n_slots=load.n_slots or DEFAULT_SLOTS, n_batch=load.n_batch or engine.n_batch
    )
    if not n_ctx:
        n_ctx = min(n_ctx_train, engine.max_context)
        floor = ENCODER_CONTEXT if hparams is not None and hparams.whole_rows else DEFAULT_CONTEXT
        if n_ctx > floor:
            # what a token of an encoder takes depends on the window
            per_token = engine.estimate(hparams, 0, structs.replace(load, n_ctx=n_ctx)).per_token
            fits = capacity // 4 // per_token // CONTEXT_STEP * CONTEXT_STEP if per_token else n_ctx
            n_ctx = min(n_ctx, max(floor, fits))
    if hparams is not None and hparams.n_positions:
        n_ctx = min(n_ctx, hparams.n_positions)
    return structs.replace(load, n_ctx=n_ctx)


def choose_legacy(path: str, engine: str = AUTO) -> str:
    """The engine for a legacy GGML file. Raises gguf.Unsupported if the named engine runs none."""
    for name in ENGINES if engine == AUTO else (engine,):
        if ENGINES[name].legacy:
            return name
    raise gguf.Unsupported(f"{path} is a legacy GGML file, which the {engine} engine cannot run")
