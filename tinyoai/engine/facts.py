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
DEFAULT_SLOTS, MAX_SLOTS = 4, 16
"""Slots where nobody chose a number: more than the first only if they share cells, and memory allows it."""
WINDOWS = 4
"""Context windows that the KV cells of all slots hold together, where memory allows it and nobody chose a number."""
LEAST_BATCH = 64
SMALL_BYTES = 1 << 30
"""In a model whose weights take less, attention over the cells of other slots is a notable part of a step."""
PLAIN_CACHE_TYPES = ("f32", "f16", "bf16")
"""Types of the KV cache that need no flash attention."""
AUTO = "auto"
"""The name that stands for the best engine that runs a file."""


def _no_adapter(adapter: gguf.Header, model: gguf.Header) -> str:
    return (
        "is a LoRA adapter, which only the llamacpp engine applies; run the model with --engine llamacpp, or leave the "
        "adapter out"
    )


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
    shares_cells: bool = False
    """Its slots can share KV cells."""
    max_context: int = DEFAULT_CONTEXT
    """Tokens of a context window that nobody chose, if the model was trained for as many."""
    installed: Callable[[], bool] = lambda: True
    """Whether its library is there; loads no native code."""
    install: str = ""
    """The command that installs its library."""
    supports_adapter: Callable[[gguf.Header, gguf.Header], str | None] = _no_adapter
    """Returns the reason why it cannot apply a LoRA adapter to a model, to follow the adapter's name."""


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
        shares_cells=True,
        max_context=llamacpp.MAX_CONTEXT,
        installed=llamacpp.installed,
        install=llamacpp.INSTALL,
        supports_adapter=llamacpp.supports_adapter,
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


def complete(
    load: wire.Load, hparams: HParams | None, n_ctx_train: int, capacity: int, size: int = SMALL_BYTES
) -> wire.Load:
    """The load with the engine's own choice of what is 0 in it: slots, tokens of a step, context window and KV cells.

    `size` is that of the file in bytes. `capacity` is the memory that the choice depends on: the machine's whole
    memory, not what is free now, so that every load gives the same. A quarter of it is for the KV cache. A model that
    has learned its positions one by one gets no more of them.
    """
    engine = ENGINES.get(load.engine)
    if engine is None:  # the worker refuses the load in words
        return load
    if not load.n_batch:
        load = structs.replace(load, n_batch=_batch(engine, load, hparams, capacity))
    window = load.n_ctx or min(n_ctx_train, engine.max_context)
    if hparams is not None and hparams.n_positions:
        window = min(window, hparams.n_positions)
    chosen = bool(load.n_ctx)
    if hparams is not None and engine.shares_cells and not hparams.whole_rows:
        return _with_cells(
            engine, load, hparams, window, capacity // 4, chosen=chosen, small=size < SMALL_BYTES
        )
    load = structs.replace(load, kv="separate", n_slots=load.n_slots or DEFAULT_SLOTS, n_ctx=window)
    floor = ENCODER_CONTEXT if hparams is not None and hparams.whole_rows else DEFAULT_CONTEXT
    if not chosen and window > floor:
        # what a token of an encoder takes depends on the window
        per_token = engine.estimate(hparams, 0, load).per_token
        fits = capacity // 4 // per_token // CONTEXT_STEP * CONTEXT_STEP if per_token else window
        load = structs.replace(load, n_ctx=min(window, max(floor, fits)))
    return load


def _with_cells(
    engine: EngineFacts,
    load: wire.Load,
    hparams: HParams,
    window: int,
    memory: int,
    *,
    chosen: bool,
    small: bool,
) -> wire.Load:
    """The load with slots, context window and KV cells for `memory` bytes of KV cache.

    Shared cells hold a few windows, and one conversation may use a whole one. Else each slot has its part of them.
    Small models are faster so, and get it where each slot then has a whole window, if any state can be copied and cut.
    """
    alone = structs.replace(load, n_slots=1, n_ctx=DEFAULT_CONTEXT, n_cells=0)
    per_cell = engine.estimate(hparams, 0, alone).per_token
    affordable = memory // per_cell // CONTEXT_STEP * CONTEXT_STEP if per_cell else window * MAX_SLOTS
    floor = min(window, DEFAULT_CONTEXT)
    n_slots = load.n_slots or DEFAULT_SLOTS
    if load.kv == "auto":
        fits = n_slots <= WINDOWS and n_slots * window <= affordable
        separate = small and fits and not hparams.n_state and not hparams.sliding_window
        load = structs.replace(load, kv="separate" if separate else "unified")
    if load.kv == "separate":
        part = min(WINDOWS * window, affordable) // n_slots // CONTEXT_STEP * CONTEXT_STEP
        n_ctx = window if chosen else min(window, max(floor, part))
        return structs.replace(load, n_slots=n_slots, n_ctx=n_ctx, n_cells=n_slots * n_ctx)
    n_slots = load.n_slots or max(DEFAULT_SLOTS, min(MAX_SLOTS, affordable // max(1, floor)))
    n_cells = max(floor, min(min(WINDOWS, n_slots) * window, affordable))
    n_ctx = window if chosen else min(window, n_cells)
    return structs.replace(load, n_slots=n_slots, n_ctx=n_ctx, n_cells=max(n_ctx, n_cells))


def _batch(engine: EngineFacts, load: wire.Load, hparams: HParams | None, capacity: int) -> int:
    """Prompt tokens of a step: the engine's number, or less if its buffers take more than a 32nd of the memory."""
    n = engine.n_batch
    load = structs.replace(load, n_slots=load.n_slots or DEFAULT_SLOTS, n_ctx=load.n_ctx or DEFAULT_CONTEXT)

    def total(n: int) -> int:
        return engine.estimate(hparams, 0, structs.replace(load, n_batch=n)).total

    while n > LEAST_BATCH and total(n) - total(LEAST_BATCH) > capacity // 32:
        n //= 2
    return n


def choose_legacy(path: str, engine: str = AUTO) -> str:
    """The engine for a legacy GGML file. Raises gguf.Unsupported if the named engine runs none."""
    for name in ENGINES if engine == AUTO else (engine,):
        if ENGINES[name].legacy:
            return name
    raise gguf.Unsupported(f"{path} is a legacy GGML file, which the {engine} engine cannot run")
