"""What a job is told to do, and what its process says of it.

Owns these types alone: the server's side and the process read the same ones. Sizes are in tokens where nothing
else is said.
"""

from typing import Literal

from msgspec import Struct

from tinyoai.models.registry import Shape

BASE = 400 << 20
"""A process that has loaded torch, in bytes."""
SPARE = 1.2
"""For what a step is not reckoned to need: as measured, it takes 0.5 to 0.8 of what is."""


Status = Literal["initializing", "running", "completed", "failed", "stopped"]
"""What a job is."""


class Spec(Struct, frozen=True, kw_only=True):
    """How to train."""

    epochs: int = 3
    batch_size: int = 4
    learning_rate: float = 2e-4
    use_lora: bool = True
    lora_r: int = 16
    lora_alpha: int = 32
    max_length: int = 512
    """Longer examples are cut at their end."""
    seed: int = 0


def memory_needed(n_params: int, shape: Shape, spec: Spec) -> int:
    """Bytes that training takes at most, about: everything is float32.

    The weights; what is trained, with its gradient and AdamW's two means; and what the backward pass needs of
    each token: in every block a dozen rows of the width and four of the feed-forward's, what goes through the
    adapters, and its logits.
    """
    d, ff = shape.n_embd, shape.n_ff
    gqa = d // shape.n_head * shape.n_head_kv
    sides = [(d, d), (d, gqa), (d, gqa), (d, d), (d, ff), (d, ff), (ff, d)]
    if spec.use_lora:
        trained = shape.n_layer * sum(spec.lora_r * (n_in + n_out) for n_in, n_out in sides)
    else:
        trained = shape.n_layer * sum(n_in * n_out for n_in, n_out in sides)
    adapters = len(sides) * spec.lora_r if spec.use_lora else 0
    row = shape.n_layer * (12 * d + 4 * ff + adapters) + 4 * shape.n_vocab
    step = spec.batch_size * spec.max_length * row
    return BASE + 4 * (n_params + 4 * trained + int(SPARE * step))


class Order(Struct, frozen=True, kw_only=True):
    """What the process is given: the model's file, how its conversations are written, and where the new file goes."""

    path: str
    template: str
    chat: bool
    """Prompts are a user's messages, and not plain text to be continued."""
    out: str
    spec: Spec


class Running(Struct, frozen=True, kw_only=True, tag=True):
    """The first word: what is ahead. `from_step`: steps made before the process was started anew."""

    n_examples: int
    n_samples: int
    """An example is a sample for each answer in it."""
    n_cut: int
    n_trained: int
    """Numbers that are trained."""
    n_steps: int
    from_step: int


class Step(Struct, frozen=True, kw_only=True, tag=True):
    """One step: the mean loss in nats over its learnt tokens; seconds since the process began to train."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    n_tokens: int
    seconds: float


class Made(Struct, frozen=True, kw_only=True, tag=True):
    """The last word of a good end: the new file is in its place."""

    size: int


class Failed(Struct, frozen=True, kw_only=True, tag=True):
    """The last word of a bad end: one sentence why."""

    message: str


Said = Running | Step | Made | Failed
