"""The training configuration and the memory that it needs."""

from msgspec import Struct

from tinyoai.engine.facts import HParams

BASE_BYTES = 400 << 20
"""A process that has loaded torch."""
SAFETY_FACTOR = 1.2
"""On the estimate of a step. Measured use is 0.5 to 0.8 of the estimate."""


class TrainConfig(Struct, frozen=True, kw_only=True):
    """How to train."""

    epochs: int = 3
    batch_size: int = 4
    learning_rate: float = 2e-4
    use_lora: bool = True
    lora_r: int = 16
    lora_alpha: int = 32
    max_length: int = 512
    """Tokens. Longer examples are cut at their end."""
    seed: int = 0


def memory_needed(n_params: int, hparams: HParams, config: TrainConfig) -> int:
    """An upper estimate in bytes of the memory that training takes. All numbers are float32.

    It adds up the weights; what is trained, with its gradient and AdamW's two means; and per token what the
    backward pass keeps: in every block twelve rows of the width, four of the feed-forward width and the
    adapters' outputs, and the logits.
    """
    d, ff = hparams.n_embd, hparams.n_ff
    d_kv = d // hparams.n_head * hparams.n_head_kv
    sides = [(d, d), (d, d_kv), (d, d_kv), (d, d), (d, ff), (d, ff), (ff, d)]
    if config.use_lora:
        trained = hparams.n_layer * sum(config.lora_r * (n_in + n_out) for n_in, n_out in sides)
    else:
        trained = hparams.n_layer * sum(n_in * n_out for n_in, n_out in sides)
    adapters = len(sides) * config.lora_r if config.use_lora else 0
    row = hparams.n_layer * (12 * d + 4 * ff + adapters) + 4 * hparams.n_vocab
    step = config.batch_size * config.max_length * row
    return BASE_BYTES + 4 * (n_params + 4 * trained + int(SAFETY_FACTOR * step))
