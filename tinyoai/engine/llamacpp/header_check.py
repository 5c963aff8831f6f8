"""The checks of a header before llama.cpp reads the file: what its loader asserts on, or trusts.

llama.cpp reports many faults of a file itself. Over others it ends its process, or reads outside of its memory.
"""

import math
from array import array

from tinyoai import gguf
from tinyoai.gguf import TENSOR_TYPES

MAX_LAYERS, MAX_EXPERTS, MAX_NAME = 512, 1024, 63
"""Limits of llama.cpp itself; a tensor's name in bytes."""
MAX_HEADS, MAX_WIDTH, MAX_CONTEXT = 8192, 1 << 20, 1 << 28
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 4096

_REMOVED_TYPES = frozenset({31, 32, 33, 36, 37, 38})
"""Tensor types that ggml no longer reads."""
_PLAIN_TYPES = frozenset({0, 1, 30})
"""F32, F16 and BF16: the types of numbers that are added or multiplied one by one, such as norms and biases."""
_ADDED = ("token_types.weight", "position_embd.weight")
"""Tables whose rows are added."""
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_BYTE_PAIR = ("gpt2", "hybriddna", "whitespace", "gemma4")
"""Kinds of tokenizers that have merges."""
_TOKENIZERS = ("llama", "bert", "t5", "rwkv", "plamo2", *_BYTE_PAIR)
_SHORT = {9: rb"\t", 10: rb"\n", 13: rb"\r", 92: rb"\\"}
"""How the vocabularies of RWKV write some bytes."""
_SPECIAL_NAMES = (
    "bos eos eot eom unknown seperator separator padding cls mask "
    "fim_pre fim_suf fim_mid fim_pad fim_rep fim_sep prefix suffix middle"
)
_SPECIAL = tuple(f"{name}_token_id" for name in _SPECIAL_NAMES.split())
"""The ids that a header may have. llama.cpp's own key spells the separator in its own way."""


class HeaderError(Exception):
    """llama.cpp cannot run the file; the words follow the file's name."""


def check(header: gguf.Header) -> None:
    """Raises HeaderError if llama.cpp would refuse the file, or crash over it."""
    _check_vocabulary(header)
    _check_tensors(header)
    _check_hyperparameters(header)


def numbers(header: gguf.Header, key: str, n: int, default: int | list[int] = 0) -> list[int]:
    """A number of each of n layers; the header has one for all, or an array. Raises HeaderError."""
    value = header.value(key, default)
    if type(value) is int:
        return [value] * n
    if not isinstance(value, array | list) or len(value) < n or any(type(item) is float for item in value):
        raise _unusable(key)
    return [int(item) for item in value[:n]]


def _unusable(key: str) -> HeaderError:
    return HeaderError(f"has no usable {key} in its header; convert the model again")


def _number(header: gguf.Header, key: str, least: int, most: int, default: int | None = None) -> int:
    value = header.value(key, default)
    if type(value) is not int or not least <= value <= most:
        raise _unusable(key)
    return value


# -- tensors -------------------------------------------------------------------------------------------


def _check_tensors(header: gguf.Header) -> None:
    if not header.tensors:
        raise HeaderError("has a vocabulary and no weights; name the model that it belongs to")
    if not MIN_ALIGNMENT <= header.alignment <= MAX_ALIGNMENT:
        raise HeaderError(f"aligns its tensors to {header.alignment} bytes; convert the model again")
    for tensor in header.tensors.values():
        if tensor.type in _REMOVED_TYPES:
            raise HeaderError(
                f"holds the tensor {tensor.name[:MAX_NAME]} in the type {tensor.type_name}, which ggml no longer "
                "reads; choose a file in Q4_0 instead"
            )
        if tensor.type not in TENSOR_TYPES:
            raise HeaderError(
                f"holds the tensor {tensor.name[:MAX_NAME]} in a type of number {tensor.type}, which this version "
                "does not know; update tinyoai, or choose a file in Q4_K_M or Q8_0"
            )
        if tensor.type not in _PLAIN_TYPES and (
            len(tensor.shape) == 1 or tensor.name in _ADDED or tensor.name.endswith(".bias")
        ):
            raise HeaderError(
                f"holds the tensor {tensor.name[:MAX_NAME]} in the type {tensor.type_name}, over which llama.cpp "
                "would end; convert the model again"
            )
        if len(tensor.name.encode()) > MAX_NAME or not tensor.size:
            raise HeaderError(
                f"has an empty tensor or one with a long name, {tensor.name[:MAX_NAME]!r}; convert the model again"
            )


# -- vocabulary ----------------------------------------------------------------------------------------


def _check_vocabulary(header: gguf.Header) -> None:
    get = header.metadata.get
    model, tokens = get("tokenizer.ggml.model"), get("tokenizer.ggml.tokens")
    if not tokens or not isinstance(tokens, list):
        raise HeaderError("has no vocabulary in its header; convert the model again")
    if model not in _TOKENIZERS:
        raise HeaderError(
            f"has a tokenizer of the kind {str(model)[:40]!r}, which this version does not know; choose another model"
        )
    n, known = len(tokens), set(tokens)
    # llama.cpp gives empty tokens names of their own
    if len(known) != n - max(0, tokens.count(b"") - 1):
        raise HeaderError("has two equal tokens in its vocabulary; convert the model again")
    for key, codes in (("scores", "fi"), ("token_type", "i")):
        values = get(f"tokenizer.ggml.{key}")
        if values is not None and not (
            isinstance(values, array) and values.typecode in codes and len(values) == n
        ):
            raise HeaderError(f"has {key} that do not fit its {n} tokens; convert the model again")
    for name in _SPECIAL:
        token = get(f"tokenizer.ggml.{name}")
        if token is not None and (type(token) is not int or not 0 <= token < n):
            raise HeaderError(f"has a {name} outside of its {n} tokens; convert the model again")
    if model in _BYTE_PAIR:
        merges = get("tokenizer.ggml.merges")
        if get("tokenizer.ggml.pre") != "kimi-k2" and not (
            isinstance(merges, list) and all(isinstance(merge, bytes) for merge in merges)
        ):
            raise HeaderError("has a byte-pair vocabulary without merges; convert the model again")
        if b"\x80" in known:
            raise HeaderError(
                "has a byte-pair vocabulary in the form of before October 2023, which llama.cpp would misread; "
                "convert the model again"
            )
    elif model in ("llama", "plamo2"):
        # over text with a byte that has no token, llama.cpp ends its process
        if not all(b"<0x%02X>" % byte in known or bytes([byte]) in known for byte in range(256)):
            raise HeaderError(
                "has a vocabulary without all byte tokens, over which llama.cpp would end; choose another model"
            )
    elif model == "rwkv":
        # over text with a byte that has no token, llama.cpp begins again without end
        if not all({bytes([byte]), b"\\x%02x" % byte, _SHORT.get(byte)} & known for byte in range(256)):
            raise HeaderError(
                "has a vocabulary without all byte tokens, over which llama.cpp would never end; "
                "choose another model"
            )
    elif model == "t5":
        charsmap = get("tokenizer.ggml.precompiled_charsmap")
        if charsmap is not None and not (isinstance(charsmap, array) and charsmap.typecode in "bB"):
            raise HeaderError("has an unusable precompiled_charsmap in its header; convert the model again")


# -- hyperparameters -----------------------------------------------------------------------------------


def _check_hyperparameters(header: gguf.Header) -> None:
    _number(header, "context_length", 1, MAX_CONTEXT)
    n_embd = _number(header, "embedding_length", 1, MAX_WIDTH)
    n_layer = _number(header, "block_count", 1, MAX_LAYERS)
    _number(header, "nextn_predict_layers", 0, n_layer - 1, 0)
    rows = header.tensors.get("token_embd.weight")
    shape = (n_embd, len(header.metadata["tokenizer.ggml.tokens"]))
    if rows is None or rows.shape[:2] != shape:
        raise HeaderError(
            f"has no token_embd.weight for {shape[1]} tokens of the width {n_embd}; convert the model again"
        )
    _check_heads(header, n_embd, n_layer)
    _check_experts(header, n_layer)
    for width in numbers(header, "feed_forward_length", n_layer):
        if not 0 <= width <= 1 << 24:
            raise _unusable("feed_forward_length")
    if header.value("rope.scaling.type", "linear") not in _ROPE_SCALINGS:
        raise _unusable("rope.scaling.type")
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base"):
        value = header.value(key)
        if value is not None and not (type(value) is float and math.isfinite(value) and value >= 0):
            raise _unusable(key)


def _check_heads(header: gguf.Header, n_embd: int, n_layer: int) -> None:
    heads = numbers(header, "attention.head_count", n_layer)
    heads_kv = numbers(header, "attention.head_count_kv", n_layer, heads)
    for n, n_kv in zip(heads, heads_kv, strict=True):
        # a layer without attention has no heads, or none for keys
        if not 0 <= n <= MAX_HEADS or not 0 <= n_kv <= MAX_HEADS or (n_kv and n % n_kv):
            raise HeaderError(f"has {n} attention heads, {n_kv} of them for keys; convert the model again")
    if not heads[0]:
        return
    for key in ("key_length", "value_length", "key_length_mla", "value_length_mla"):
        _number(header, f"attention.{key}", 1, MAX_WIDTH, n_embd)
    if header.value("attention.key_length") is None and n_embd % heads[0]:
        raise HeaderError(f"has {heads[0]} attention heads, which do not divide its width of {n_embd}")
    _number(header, "rope.dimension_count", 0, MAX_WIDTH, 0)


def _check_experts(header: gguf.Header, n_layer: int) -> None:
    n = _number(header, "expert_count", 0, MAX_EXPERTS, 0)
    used = max(numbers(header, "expert_used_count", n_layer))
    groups = _number(header, "expert_group_count", 0, MAX_EXPERTS, 0)
    groups_used = _number(header, "expert_group_used_count", 0, MAX_EXPERTS, 0)
    if n <= 1 and header.architecture.startswith("hunyuan"):
        return  # llama.cpp takes it for a model without experts
    good = 0 < used <= n and groups < n if n else not used and not groups
    if groups > 1:
        good = good and n % groups == 0 and 0 < groups_used < groups
    if not good:
        raise HeaderError(f"has {n} experts, {used} of them used; convert the model again")
