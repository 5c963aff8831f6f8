"""Engines by name: which files they run and how much memory a load takes. Imports no native code.

This module and `engine/NAME/facts.py` are the only parts of `engine` that the server imports. A worker opens a
model with `engine.opening`.
"""

from collections.abc import Callable
from typing import NamedTuple

from tinyoai import gguf, wire
from tinyoai.engine.ctransformers import facts as ctransformers
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
    "WORKER_BYTES",
    "EngineFacts",
    "HParams",
    "MemoryEstimate",
    "choose",
    "choose_legacy",
]

AUTO = "auto"
"""The name that stands for the first engine that runs a file."""


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


def _no_file(header: gguf.Header) -> str:
    return "is a model file, and the fake engine runs none"


def _fake_hparams(header: gguf.Header) -> HParams:
    raise gguf.Unsupported(f"{header.path} {_no_file(header)}")


ENGINES: dict[str, EngineFacts] = {
    "ctransformers": EngineFacts(
        ctransformers.supports, ctransformers.hparams, ctransformers.estimate, legacy=True
    ),
    # it reserves as much as ctransformers, so that memory budgets can be tried without loading models
    "fake": EngineFacts(_no_file, _fake_hparams, ctransformers.estimate),
}
"""In the order in which `choose` tries them."""


def choose(header: gguf.Header, engine: str = AUTO) -> str:
    """The engine for a file: the named one, or the first that runs it.

    Raises gguf.Unsupported with the reason of the named engine, or of the first one.
    """
    reasons = []
    for name in ENGINES if engine == AUTO else (engine,):
        reason = ENGINES[name].supports(header)
        if reason is None:
            return name
        reasons.append(reason)
    raise gguf.Unsupported(f"{header.path} {reasons[0]}")


def choose_legacy(path: str, engine: str = AUTO) -> str:
    """The engine for a legacy GGML file. Raises gguf.Unsupported if the named engine runs none."""
    for name in ENGINES if engine == AUTO else (engine,):
        if ENGINES[name].legacy:
            return name
    raise gguf.Unsupported(f"{path} is a legacy GGML file, which the {engine} engine cannot run")
