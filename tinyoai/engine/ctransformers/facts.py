"""The files that ctransformers 0.2.27 can run safely, and the memory that a load takes.

The library ends its process, or answers wrongly, over files that it does not expect; so each number that it
relies on is checked here. Files that fail may be valid for another engine and are not called damaged.
"""

import platform
from array import array

from tinyoai import gguf, wire
from tinyoai.engine.memory_estimate import WORKER_BYTES, HParams, MemoryEstimate
from tinyoai.gguf import TENSOR_TYPES

ARCHITECTURES = ("llama", "falcon")
"""The families that the library runs as GGUF."""
TYPES = frozenset({0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14})
"""The tensor types that it knows: F32, F16, Q4_0 to Q8_0 and Q2_K to Q6_K."""

_RUNS = (
    "ctransformers runs llama (Llama 2, Mistral) and falcon files of 2023, and the llamacpp engine newer ones"
)


class _Reason(Exception):
    """The reason why the library cannot run the file, in words that follow the file's name."""


def supports(header: gguf.Header) -> str | None:
    """Returns the reason why ctransformers cannot run the file, to follow the file's name; None if it can."""
    try:
        _check(header)
    except _Reason as reason:
        return str(reason)
    return None


def require(header: gguf.Header) -> None:
    """Raises gguf.Unsupported with the reason if ctransformers cannot run the file."""
    reason = supports(header)
    if reason is not None:
        raise gguf.Unsupported(f"{header.path} {reason}")


def hparams(header: gguf.Header) -> HParams:
    """Hyperparameters of a file that `supports` accepts."""
    n_head = int(header.value("attention.head_count"))
    return HParams(
        n_layer=int(header.value("block_count")),
        n_embd=int(header.value("embedding_length")),
        n_head=n_head,
        n_head_kv=int(header.value("attention.head_count_kv", n_head)),
        n_ff=int(header.value("feed_forward_length")),
        n_vocab=len(header.metadata["tokenizer.ggml.tokens"]),
    )


def estimate(hparams: HParams | None, file_size: int, load: wire.Load) -> MemoryEstimate:
    """The file, which is mapped; in every slot a KV cache and scratch memory for a batch.

    Without hyperparameters (legacy files) the file alone.
    """
    if hparams is None:
        return MemoryEstimate(WORKER_BYTES + file_size, 0, load.n_ctx)
    n_gqa = hparams.n_embd // hparams.n_head * hparams.n_head_kv
    # two F16 numbers, key and value, for each layer and position
    cache = 2 * 2 * hparams.n_layer * n_gqa
    # F32: the attention scores of a batch over the whole context, and their softmax
    attention = 2 * 4 * load.n_batch * hparams.n_head
    # F32: a batch's rows, several of the model's width at a time, of the feed-forward width, and the logits
    rows = 4 * load.n_batch * (8 * hparams.n_embd + 3 * hparams.n_ff + hparams.n_vocab)
    fixed = WORKER_BYTES + file_size + load.n_slots * rows
    return MemoryEstimate(fixed, load.n_slots * (cache + attention), load.n_ctx)


def odd_on_arm(n: int) -> bool:
    """Returns whether the library aborts over quantized rows of n values on this machine.

    On ARM it multiplies blocks of 32 values two by two and asserts that none is left over.
    """
    return n % 64 != 0 and platform.machine().lower().startswith(("arm", "aarch64"))


def odd_rows(what: str) -> str:
    """The reason for rows that `odd_on_arm` refuses."""
    return (
        f"has {what}, and ctransformers runs only multiples of 64 on ARM; choose the same model in F16, or one "
        "whose width is such a multiple"
    )


# -- checks ----------------------------------------------------------------------------------------


def _check(header: gguf.Header) -> None:
    arch = header.architecture
    if not arch:
        raise _Reason("names no architecture in its header; convert the model again")
    if header.n_files > 1:
        raise _Reason(f"is split into {header.n_files} files, which ctransformers cannot read; {_RUNS}")
    if arch not in ARCHITECTURES:
        raise _Reason(f"is a {arch[:40]} model; {_RUNS}")
    n_vocab = _check_vocabulary(header)
    n_embd = _count(header, "embedding_length", 1 << 20)
    n_layer = _count(header, "block_count", 4096)
    n_head = _count(header, "attention.head_count", 4096)
    n_head_kv = _count(header, "attention.head_count_kv", 4096, n_head)
    _count(header, "context_length", 1 << 26)
    if n_embd % n_head or n_head % n_head_kv or (n_embd // n_head) % 2:
        raise _Reason(
            f"has {n_head} attention heads, {n_head_kv} of them for keys, which do not divide its width of "
            f"{n_embd}; {_RUNS}"
        )
    epsilon = header.value(
        "attention.layer_norm_rms_epsilon" if arch == "llama" else "attention.layer_norm_epsilon"
    )
    if type(epsilon) is not float or not 0 < epsilon < 1:
        raise _Reason(f"has no usable norm epsilon in its header; {_RUNS}")
    n_rot = header.value("rope.dimension_count", n_embd // n_head)
    if n_rot != n_embd // n_head:
        raise _Reason(f"has a rotary dimension of {n_rot}, not its heads' {n_embd // n_head}; {_RUNS}")
    n_gqa = n_embd // n_head * n_head_kv
    n_ff = _count(header, "feed_forward_length", 1 << 22)
    _check_tensors(header)
    if arch == "llama":
        _check_llama(header, n_vocab, n_embd, n_layer, n_gqa, n_ff)
    else:
        _check_falcon(header, n_vocab, n_embd, n_layer, n_gqa)


def _count(header: gguf.Header, key: str, most: int, default: int | None = None) -> int:
    value = header.value(key, default)
    if type(value) is not int or not 0 < value <= most:
        raise _Reason(f"has no usable {key} in its header; {_RUNS}")
    return value


def _check_vocabulary(header: gguf.Header) -> int:
    get = header.metadata.get
    model, tokens = get("tokenizer.ggml.model"), get("tokenizer.ggml.tokens")
    if not tokens:
        raise _Reason(f"has no vocabulary; {_RUNS}")
    if model not in ("llama", "gpt2"):
        raise _Reason(f"has a tokenizer of the kind {str(model)[:40]!r}; {_RUNS}")
    if model == "gpt2" and header.architecture == "llama":
        raise _Reason(
            f"has a byte-pair vocabulary, as Llama 3 has, which ctransformers would misread; {_RUNS}"
        )
    n, known = len(tokens), set(tokens)
    for key in ("scores", "token_type"):
        values = get(f"tokenizer.ggml.{key}")
        code = "f" if key == "scores" else "i"
        if not isinstance(values, array) or values.typecode != code or len(values) != n:
            raise _Reason(f"has no usable {key} for its {n} tokens; {_RUNS}")
    for key in ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id", "separator_token_id"):
        token = get(f"tokenizer.ggml.{key}")
        if token is not None and (type(token) is not int or not 0 <= token < n):
            raise _Reason(f"has a {key} outside of its vocabulary; {_RUNS}")
    if model == "llama":
        if not all(b"<0x%02X>" % byte in known for byte in range(256)):
            raise _Reason(
                f"has a vocabulary without all byte tokens, over which ctransformers crashes; {_RUNS}"
            )
    elif not all(bytes([byte]) in known for byte in range(1, 256)):
        raise _Reason(
            "has a byte-pair vocabulary in the form that converters write since October 2023, over which "
            f"ctransformers crashes; {_RUNS}"
        )
    if model == "gpt2" and not isinstance(get("tokenizer.ggml.merges"), list):
        raise _Reason(f"has a byte-pair vocabulary without merges; {_RUNS}")
    return n


def _check_tensors(header: gguf.Header) -> None:
    if header.alignment < 8:
        raise _Reason(f"aligns its tensors to {header.alignment} bytes; {_RUNS}")
    for tensor in header.tensors.values():
        if tensor.type not in TYPES:
            raise _Reason(
                f"holds the tensor {tensor.name} in the type {tensor.type_name}, which ctransformers does not know; "
                "choose a file in F16, Q8_0 or one of Q2_K to Q6_K"
            )
        if not tensor.size or len(tensor.name) > 64:
            raise _Reason(f"has an empty tensor or one with a long name, {tensor.name[:64]!r}; {_RUNS}")
        if TENSOR_TYPES[tensor.type].block == 32 and odd_on_arm(tensor.shape[0]):
            raise _Reason(odd_rows(f"rows of {tensor.shape[0]} values in {tensor.type_name}"))


def _check_llama(header: gguf.Header, n_vocab: int, n_embd: int, n_layer: int, n_gqa: int, n_ff: int) -> None:
    _norm(header, "output_norm.weight", n_embd)
    for name in ("token_embd.weight", "output.weight"):
        _tensor(header, name, (n_embd, n_vocab))
    for i in range(n_layer):
        for norm in ("attn_norm", "ffn_norm"):
            _norm(header, f"blk.{i}.{norm}.weight", n_embd)
        for name, n_in, n_out in (
            ("attn_q", n_embd, n_embd),
            ("attn_k", n_embd, n_gqa),
            ("attn_v", n_embd, n_gqa),
            ("attn_output", n_embd, n_embd),
            ("ffn_gate", n_embd, n_ff),
            ("ffn_up", n_embd, n_ff),
            ("ffn_down", n_ff, n_embd),
        ):
            _tensor(header, f"blk.{i}.{name}.weight", (n_in, n_out))


def _check_falcon(header: gguf.Header, n_vocab: int, n_embd: int, n_layer: int, n_gqa: int) -> None:
    for part in ("weight", "bias"):
        _norm(header, f"output_norm.{part}", n_embd)
        for i in range(n_layer):
            _norm(header, f"blk.{i}.attn_norm.{part}", n_embd)
    for name in ("token_embd.weight", "output.weight"):
        _tensor(header, name, (n_embd, n_vocab))
    for i in range(n_layer):
        for name, n_in, n_out in (
            ("attn_qkv", n_embd, n_embd + 2 * n_gqa),
            ("attn_output", n_embd, n_embd),
            ("ffn_up", n_embd, 4 * n_embd),
            ("ffn_down", 4 * n_embd, n_embd),
        ):
            _tensor(header, f"blk.{i}.{name}.weight", (n_in, n_out))


def _norm(header: gguf.Header, name: str, n: int) -> None:
    _tensor(header, name, (n,))
    if header.tensors[name].type != 0:
        raise _Reason(f"holds the tensor {name} in another type than F32; {_RUNS}")


def _tensor(header: gguf.Header, name: str, shape: tuple[int, ...]) -> None:
    tensor = header.tensors.get(name)
    if tensor is None:
        raise _Reason(f"has no tensor {name}; {_RUNS}")
    if tensor.shape != shape:
        raise _Reason(f"has the tensor {name} in the shape {tensor.shape} instead of {shape}; {_RUNS}")
