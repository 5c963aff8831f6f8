"""The memory estimate of a load, in the form that every engine uses. Sizes are in bytes."""

from typing import NamedTuple

from msgspec import Struct

WORKER_BYTES = 40 << 20
"""A worker without a model: interpreter and libraries."""
DEFAULT_CONTEXT = 4096
"""Tokens of a context window that nobody chose, if the model was trained for as many and nothing says more."""
CONTEXT_STEP = 32
"""Context windows that are computed are multiples of this."""


class HParams(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Hyperparameters that decide how much memory a model takes; of numbers that differ by layer the largest."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    # of llama.cpp alone
    n_key: int = 0
    """Numbers that the KV cache keeps of a token as keys, over all layers."""
    n_value: int = 0
    """The same of values."""
    n_state: int = 0
    """Numbers that recurrent layers keep of a sequence, over all layers."""
    n_row: int = 0
    """Numbers that a row of a batch needs while it is evaluated."""
    n_positions: int = 0
    """Positions that the model has learned one by one, beyond which it cannot go; 0: no such limit."""
    sliding_window: bool = False
    """Some layers look at the last tokens alone."""
    whole_rows: bool = False
    """An encoder: it has no KV cache, and a text is evaluated in one step."""
    pools: bool = False
    """It is made for embeddings, so that every token of a step has an output."""
    ranks: bool = False
    """It is made to score how well a document answers a query."""
    flash_attention: bool = True
    """Whether the library can run it with flash attention."""
    vocabulary_bytes: int = 0
    repacked_bytes: int = 0
    """Weights that the library keeps a second time, in another order."""
    staging_bytes: int = 0
    """The largest of them."""


class MemoryEstimate(NamedTuple):
    """Bytes that a load takes: `fixed`, and `per_token` of its context window: one cell or more."""

    fixed: int
    per_token: int
    n_ctx: int

    @property
    def total(self) -> int:
        """Bytes with the whole context window filled in every slot."""
        return self.fixed + self.per_token * self.n_ctx

    def at_least(self, n: int) -> "MemoryEstimate":
        """The same, but of n bytes in all if it is of less."""
        return self._replace(fixed=self.fixed + max(0, n - self.total))

    def more(self, n: int) -> "MemoryEstimate":
        """The same and n bytes."""
        return self._replace(fixed=self.fixed + n)

    def largest_context(self, budget: int) -> int:
        """The largest context window in tokens that fits into `budget` bytes; 0 if none does."""
        if not self.per_token or self.fixed >= budget:
            return 0
        fits = (budget - self.fixed) // self.per_token
        return min(fits, self.n_ctx) // CONTEXT_STEP * CONTEXT_STEP

    def shortage(self, budget: int, n_slots: int) -> str:
        """The sentence for a load that exceeds `budget`, to follow the model's name: sizes and a remedy."""
        window = f" with {self.n_ctx} tokens of context and {n_slots} slots" if self.per_token else ""
        fits = self.largest_context(budget)
        remedy = (
            f"a context of {fits} tokens fits (--ctx-size {fits}), or fewer slots with --parallel"
            if fits
            else "choose a smaller or more quantized model"
        )
        return f"needs about {self.total / 1e6:.0f} MB{window}, and {budget / 1e6:.0f} MB are available; {remedy}"
