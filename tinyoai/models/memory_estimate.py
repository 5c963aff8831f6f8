"""How much memory a model will need.

Owns the estimate from its shape. It must not know how much there is, what is loaded or what is to be done when
memory is short. All sizes are in bytes.
"""

from typing import NamedTuple

from tinyoai import wire
from tinyoai.models.registry import Model

BASE = 40 << 20
"""A worker without a model, with its interpreter and libraries."""
BLOCK = 32
"""Context windows are told in multiples of this."""


class Need(NamedTuple):
    """What a model takes: `fixed`, and `per_token` of its context window over all slots."""

    fixed: int
    per_token: int
    n_ctx: int

    @property
    def total(self) -> int:
        """With its whole context window filled in every slot."""
        return self.fixed + self.per_token * self.n_ctx

    def largest_context(self, budget: int) -> int:
        """The context window in tokens that would fit; 0 if not even one block would, or none would help."""
        if not self.per_token or self.fixed >= budget:
            return 0
        fits = (budget - self.fixed) // self.per_token
        return min(fits, self.n_ctx) // BLOCK * BLOCK


def need(model: Model, load: wire.Load) -> Need:
    """The estimate: the file, which is mapped; a KV cache of two F16 numbers for each layer and position, and
    scratch for a batch, in every slot. Without a shape (legacy files, the scripted engine) the file alone."""
    shape = model.shape
    if shape is None:
        return Need(BASE + model.size, 0, load.n_ctx)
    n_gqa = shape.n_embd // shape.n_head * shape.n_head_kv
    cache = 2 * 2 * shape.n_layer * n_gqa
    # F32 in both: attention of a batch over the whole context, its scores and their softmax; and a batch's rows,
    # several of the model's width at a time, the feed-forward's and the logits
    attention = 2 * 4 * load.n_batch * shape.n_head
    rows = 4 * load.n_batch * (8 * shape.n_embd + 3 * shape.n_ff + shape.n_vocab)
    return Need(BASE + model.size + load.n_slots * rows, load.n_slots * (cache + attention), load.n_ctx)
