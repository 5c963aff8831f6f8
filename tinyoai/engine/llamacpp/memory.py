"""How much memory llama.cpp takes for a model: hyperparameters from its header, and the estimate of a load.

The numbers are of llama.cpp 0.5 and 0.6 on processors, measured with all pages touched.
"""

import platform
from importlib.util import find_spec

from tinyoai import gguf, wire
from tinyoai.engine.llamacpp import rank_head
from tinyoai.engine.llamacpp.architectures import ENCODERS, reads_whole_texts
from tinyoai.engine.llamacpp.header_check import numbers
from tinyoai.engine.memory_estimate import WORKER_BYTES, HParams, MemoryEstimate
from tinyoai.gguf import TENSOR_TYPES

LIBRARY_BYTES = 26 << 20
"""The library, Jinja, numpy and OpenSSL, over a worker without a model."""
SCORED_ROWS = 16
"""Tokens of a step that may have outputs, beside one of each slot."""
CELL_STEP = 256
"""llama.cpp rounds the cells of a KV cache up to a multiple of this."""
CELL_BYTES = 64
"""What a cell takes beside its keys and values."""
TOKEN_BYTES, MERGE_BYTES, TRIE_BYTES, TABLE_BYTES = 262, 217, 640, 2_700_000
"""A token and a merge of a vocabulary, a token of one that is searched by a trie, and the tables of merges."""
SAMPLER_BYTES = 6
"""A token of the vocabulary, for each slot that samples."""

_F32 = 4
CACHE_TYPES = {kind.name.lower(): number for number, kind in TENSOR_TYPES.items()}
"""ggml's numbers of the tensor types of a KV cache, by name."""
_NO_FLASH_ATTENTION = "grok"
"""The family that llama.cpp runs without flash attention."""
_LINEAR_ATTENTION = "minimax-01"
"""The family whose recurrent layers have no tensors of their own kind."""
_REPACKED = frozenset({"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"})
_REPACKED_ON_ARM = _REPACKED | {"Q5_K", "Q6_K", "Q8_0"}
"""Tensor types that llama.cpp copies into the order of its fastest kernels."""
_RECURRENT = ("ssm_", "shortconv", "time_mix")
"""Tensors of recurrent layers begin with one of these."""


def _number_bytes(cache_type: str) -> float:
    """Bytes of a number in a KV cache."""
    kind = TENSOR_TYPES[CACHE_TYPES[cache_type]]
    return kind.block_bytes / kind.block


def hparams(header: gguf.Header) -> HParams:
    """Hyperparameters of a file that `supports` accepts."""
    arch = header.architecture
    n_embd = int(header.value("embedding_length"))
    n_layer = int(header.value("block_count"))
    heads = numbers(header, "attention.head_count", n_layer)
    n_head = max(heads)
    n_ff = max(numbers(header, "feed_forward_length", n_layer))
    n_key, n_value, n_state = (0, 0, 0) if arch in ENCODERS else _kept(header, n_layer, heads)
    repacked = _repacked(header)
    positions = header.tensors.get("position_embd.weight")
    return HParams(
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=max(numbers(header, "attention.head_count_kv", n_layer, heads)),
        n_ff=n_ff,
        n_vocab=len(header.metadata["tokenizer.ggml.tokens"]),
        n_key=n_key,
        n_value=n_value,
        n_state=n_state,
        n_row=_row(header, n_embd, n_head, n_ff),
        n_positions=positions.shape[1] if positions is not None and len(positions.shape) > 1 else 0,
        sliding_window=bool(header.value("attention.sliding_window")),
        whole_rows=reads_whole_texts(header),
        pools=bool(header.value("pooling_type")) and not rank_head.ranks(header),
        ranks=rank_head.ranks(header),
        flash_attention=arch != _NO_FLASH_ATTENTION,
        vocabulary_bytes=_vocabulary(header),
        repacked_bytes=sum(repacked),
        staging_bytes=max(repacked, default=0),
    )


def _kept(header: gguf.Header, n_layer: int, heads: list[int]) -> tuple[int, int, int]:
    """The numbers that a cache keeps over all layers: keys and values of a token, and the state of a sequence."""
    arch = header.architecture
    n_layer -= int(header.value("nextn_predict_layers", 0))  # they draft, and a cache has no room for them
    n_shared = int(header.value("attention.shared_kv_layers", 0))
    with_cache = (
        20 if arch == "gemma3n" else n_layer - n_shared
    )  # further layers use the cache of earlier ones
    heads_kv = numbers(header, "attention.head_count_kv", n_layer, heads)
    head = int(header.value("embedding_length")) // heads[0] if heads[0] else 0
    key, value = (int(header.value(f"attention.{what}_length", head)) for what in ("key", "value"))
    compressed = header.value("attention.key_length_mla") is not None  # its values are read out of its keys
    indexer = int(header.value("attention.indexer.key_length", 0))
    parts: dict[int, set[str]] = {}
    for name in header.tensors:
        if name.startswith("blk."):
            _, number, part = name.split(".", 2)
            if number.isdecimal():
                parts.setdefault(int(number), set()).add(part)
    n_key = n_value = n_recurrent = 0
    for i in range(n_layer):
        names = parts.get(i, set())
        recurrent = any(name.startswith(_RECURRENT) for name in names)
        n_recurrent += recurrent or arch == _LINEAR_ATTENTION
        if i >= with_cache or not heads_kv[i]:
            continue
        keys, values = (header.tensors.get(f"blk.{i}.attn_{what}.weight") for what in "kv")
        if keys is not None and not compressed:
            n_key += keys.shape[1]
            n_value += values.shape[1] if values is not None else keys.shape[1]
        elif not recurrent:
            n_key += key * heads_kv[i]
            n_value += 0 if compressed else value * heads_kv[i]
        if any("indexer" in name for name in names):
            n_key += indexer
    return n_key, n_value, n_recurrent * _state(header, max(heads))


def _state(header: gguf.Header, n_head: int) -> int:
    """The numbers that a recurrent layer keeps of a sequence, convolutions included."""

    def get(key: str, default: int = 0) -> int:
        return int(header.value(key, default))

    n_embd, conv = get("embedding_length"), max(0, get("ssm.conv_kernel") - 1)
    if head := get("wkv.head_size"):
        return n_embd * (get("token_shift_count", 2) + head)
    if cache := get("shortconv.l_cache"):
        return n_embd * (cache - 1)
    if head := get("kda.head_dim"):
        return n_head * head * (3 * (conv or 3) + head)
    if header.architecture == _LINEAR_ATTENTION:
        head = get("attention.key_length", n_embd // max(1, n_head))
        return n_head * head * head
    inner, state = get("ssm.inner_size"), get("ssm.state_size")
    return conv * (inner + 2 * get("ssm.group_count") * state) + inner * state


def _row(header: gguf.Header, n_embd: int, n_head: int, n_ff: int) -> int:
    """The numbers that a row of a batch needs at the widest place of the graph, generously."""

    def get(key: str) -> int:
        return int(header.value(key) or 0)

    used = max(numbers(header, "expert_used_count", 1)) if get("expert_count") else 0
    experts = used * (3 * max(numbers(header, "expert_feed_forward_length", 1, n_ff)) + 2 * n_embd)
    experts += get("expert_count") + 3 * get("expert_shared_feed_forward_length")
    attention = n_head * max(get("attention.key_length"), get("attention.value_length"))
    recurrent = get("ssm.inner_size") + 2 * get("ssm.group_count") * get("ssm.state_size")
    return 8 * max(n_embd, attention) + max(4 * n_ff, experts) + 8 * recurrent


def _vocabulary(header: gguf.Header) -> int:
    """Bytes of the tables that llama.cpp makes of a vocabulary."""
    meta = header.metadata
    n, merges = len(meta["tokenizer.ggml.tokens"]), meta.get("tokenizer.ggml.merges") or ()
    if meta["tokenizer.ggml.model"] in ("t5", "rwkv", "plamo2"):
        return n * TRIE_BYTES
    return n * TOKEN_BYTES + (len(merges) * MERGE_BYTES + TABLE_BYTES if merges else 0)


def _repacked(header: gguf.Header) -> list[int]:
    """Sizes of the tensors that llama.cpp copies into another order for this kind of processor."""
    if platform.machine().lower().startswith(("arm", "aarch64")):
        # the wheel is built for every ARM processor and has no such kernels; a native build has
        names = _REPACKED_ON_ARM if find_spec("llama_cpp") else frozenset()
    else:
        names = _REPACKED
    tied = "output.weight" not in header.tensors
    return [
        tensor.size
        for tensor in header.tensors.values()
        if tensor.type_name in names
        and len(tensor.shape) > 1
        and not tensor.shape[1] % 8
        and (tied or not tensor.name.startswith("token_embd."))
    ]


def n_cells_of(load: wire.Load) -> int:
    """KV cells of a load: those of all slots together."""
    if load.kv == "separate" or not load.n_cells:
        return load.n_slots * load.n_ctx
    return load.n_cells


def estimate(hparams: HParams | None, file_size: int, load: wire.Load) -> MemoryEstimate:
    """The files, the vocabulary, the KV cache of all slots, and the buffers of a step."""
    base = WORKER_BYTES + LIBRARY_BYTES + file_size + sum(adapter.size for adapter in load.adapters)
    if hparams is None:
        return MemoryEstimate(base, 0, load.n_ctx)
    flash = hparams.flash_attention and load.flash_attn != "off"
    base += hparams.vocabulary_bytes + (hparams.repacked_bytes if load.mmap else hparams.staging_bytes)
    state = 4 * _F32 * load.n_slots * hparams.n_state
    cell = hparams.n_key * _number_bytes(load.cache_type_k) + hparams.n_value * _number_bytes(
        load.cache_type_v
    )
    if hparams.whole_rows:
        # a text is one row: each of its tokens looks at every other, and llama.cpp keeps room for its logits
        scores = load.n_ctx * (2 if flash else 2 * _F32 * (1 + hparams.n_head))
        # with a cache it is a decoder: its logits leave the graph in one buffer and arrive in another
        n_logits = hparams.n_vocab * (2 if cell else 1)
        per_token = _F32 * (hparams.n_row + n_logits) + scores + int(cell)
        return MemoryEstimate(base, per_token, load.n_ctx)
    scored = load.n_batch if hparams.pools else min(SCORED_ROWS, load.n_batch)
    n_outputs = max(scored, load.n_slots) + load.n_slots
    # logits leave the graph in one buffer and wait for the samplers in another
    outputs = hparams.n_vocab * (2 * _F32 * n_outputs + SAMPLER_BYTES * load.n_slots)
    mask = load.n_batch * (2 if flash else _F32 * (1 + hparams.n_head))
    per_cell = int(cell) + mask + CELL_BYTES if cell else 0
    step = _F32 * (load.n_batch + load.n_slots) * hparams.n_row + CELL_STEP * per_cell
    n_cells = n_cells_of(load)
    per_token = -(-per_cell * n_cells // max(1, load.n_ctx))
    return MemoryEstimate(base + outputs + state + step, per_token, load.n_ctx)
