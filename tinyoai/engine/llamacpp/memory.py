"""How much memory llama.cpp takes for a model: hyperparameters from its header, and the estimate of a load."""

from tinyoai import gguf, wire
from tinyoai.engine.llamacpp.architectures import ENCODERS
from tinyoai.engine.llamacpp.header_check import numbers
from tinyoai.engine.memory_estimate import WORKER_BYTES, HParams, MemoryEstimate

LIBRARY_BYTES = 30 << 20
"""The library and its start-up data, over a worker without a model."""
CELL_STEP = 256
"""llama.cpp rounds the cells of a KV cache up to a multiple of this."""
CACHE_TYPES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
"""Bytes of a number in the KV cache, by the type's name."""


def hparams(header: gguf.Header) -> HParams:
    """Hyperparameters of a file that `supports` accepts."""
    n_layer = int(header.value("block_count"))
    n_embd = int(header.value("embedding_length"))
    heads = numbers(header, "attention.head_count", n_layer)
    heads_kv = numbers(header, "attention.head_count_kv", n_layer, heads[0])
    n_head = max(heads)
    head = n_embd // n_head if n_head else 0
    key, value = (int(header.value(f"attention.{what}_length", head)) for what in ("key", "value"))
    encoder = header.architecture in ENCODERS
    return HParams(
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=max(heads_kv),
        n_ff=max(numbers(header, "feed_forward_length", n_layer)),
        n_vocab=len(header.metadata["tokenizer.ggml.tokens"]),
        n_key=0 if encoder else key * sum(heads_kv),
        n_value=0 if encoder else value * sum(heads_kv),
    )


def estimate(hparams: HParams | None, file_size: int, load: wire.Load) -> MemoryEstimate:
    """The file, the KV cache of all slots, and the buffers of a step."""
    if hparams is None:
        return MemoryEstimate(WORKER_BYTES + LIBRARY_BYTES + file_size, 0, load.n_ctx)
    cache = load.n_slots * (
        hparams.n_key * CACHE_TYPES[load.cache_type_k] + hparams.n_value * CACHE_TYPES[load.cache_type_v]
    )
    rows = 4 * load.n_batch * (8 * hparams.n_embd + 3 * hparams.n_ff)
    outputs = 4 * 2 * load.n_slots * hparams.n_vocab
    fixed = WORKER_BYTES + LIBRARY_BYTES + file_size + rows + outputs
    return MemoryEstimate(fixed, int(cache), load.n_ctx)
