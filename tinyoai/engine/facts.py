"""Engines by name: which files they run and how much memory a load takes. Imports no native code.

This module and `engine/NAME/facts.py` are the only parts of `engine` that the server imports. A worker opens a
model with `engine.opening`.
"""

from collections.abc import Callable
from typing import NamedTuple

from msgspec import Struct

from tinyoai import gguf, wire

WORKER_BYTES = 40 << 20
"""A worker without a model: interpreter and libraries."""
CONTEXT_STEP = 32
"""Context windows that a message proposes are multiples of this."""


class HParams(Struct, frozen=True, kw_only=True):
    """Hyperparameters that decide how much memory a model takes."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int


class MemoryEstimate(NamedTuple):
    """Bytes that a load takes: `fixed`, and `per_token` of its context window over all slots."""

    fixed: int
    per_token: int
    n_ctx: int

    @property
    def total(self) -> int:
        """Bytes with the whole context window filled in every slot."""
        return self.fixed + self.per_token * self.n_ctx

    def largest_context(self, budget: int) -> int:
        """The largest context window in tokens that fits into `budget` bytes; 0 if none does."""
        if not self.per_token or self.fixed >= budget:
            return 0
        fits = (budget - self.fixed) // self.per_token
        return min(fits, self.n_ctx) // CONTEXT_STEP * CONTEXT_STEP


class EngineFacts(NamedTuple):
    """What the server can know of an engine without loading it."""

    supports: Callable[[gguf.Header], str | None]
    """Why the engine cannot run a file, in words that follow the file's name; None if it can."""
    hparams: Callable[[gguf.Header], HParams]
    estimate: Callable[[HParams | None, int, wire.Load], MemoryEstimate]
    """From hyperparameters (None: not known), file size in bytes and load."""
