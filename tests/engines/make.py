"""Makes small model files with random weights, of every kind that the engines run.

Weights come from a fixed seed. `bench/make_model.py` makes the larger ones that benchmarks use.
"""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

SPECIAL = ("<|im_start|>", "<|im_end|>")
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def spm_vocabulary(n: int = 600) -> tuple[list[bytes], list[float], list[int]]:
    """Returns the tokens, scores and types of a SentencePiece vocabulary: bytes, letters and pairs."""
    tokens = [
        b"<unk>",
        b"<s>",
        b"</s>",
        *(b"<0x%02X>" % i for i in range(256)),
        *(s.encode() for s in SPECIAL),
    ]
    types = [2, 3, 3] + [6] * 256 + [3, 3]
    letters = [chr(c) for c in range(33, 127)]
    pieces = [
        "\u2581",
        *letters,
        "<s",
        *(f"\u2581{c}" for c in letters),
        *(a + b for a in "etaoin" for b in "srhldu"),
    ]
    for piece in list(dict.fromkeys(pieces))[: n - len(tokens)]:
        tokens.append(piece.encode())
        types.append(1)
    scores = [0.0] * 261 + [-float(i) for i in range(len(tokens) - 261)]
    # the text "<s>" can merge into the control token of that name, so tests can check that it never does
    scores[1] = 0.0
    return tokens, scores, types


def llama(
    path: Path,
    *,
    n_layer: int = 2,
    n_embd: int = 64,
    n_head: int = 2,
    n_ff: int = 128,
    n_vocab: int = 600,
    n_ctx: int = 512,
    seed: int = 1,
    arch: str = "llama",
    weights: str = "Q8_0",
    **changes: Any,
) -> Path:
    """Writes a GGUF llama with matrices of a type. `changes` replace metadata values by key; two underscores stand for a dot."""
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), arch)
    values: dict[str, Any] = {
        f"{arch}.context_length": n_ctx,
        f"{arch}.embedding_length": n_embd,
        f"{arch}.block_count": n_layer,
        f"{arch}.feed_forward_length": n_ff,
        f"{arch}.rope.dimension_count": n_embd // n_head,
        f"{arch}.attention.head_count": n_head,
        f"{arch}.attention.head_count_kv": n_head,
    }
    values |= {
        key.replace("__", "."): value for key, value in changes.items() if not isinstance(value, float)
    }
    for key, value in values.items():
        writer.add_uint32(key, value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", changes.get("epsilon", 1e-5))
    tokens, scores, types = spm_vocabulary(n_vocab)
    n_vocab = len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(name: str, n_in: int, n_out: int) -> None:
        kind = gguf.GGMLQuantizationType[weights]
        if kind is gguf.GGMLQuantizationType.Q6_K:
            writer.add_tensor(name, _random_q6_k(draw, n_out, n_in), raw_dtype=kind)
            return
        data = (draw.standard_normal((n_out, n_in)) * 0.1).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(n_embd, np.float32))

    matrix("token_embd.weight", n_embd, n_vocab)
    norm("output_norm.weight")
    matrix("output.weight", n_embd, n_vocab)
    for i in range(n_layer):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{i}.{part}.weight", n_embd, n_embd)
        matrix(f"blk.{i}.ffn_gate.weight", n_embd, n_ff)
        matrix(f"blk.{i}.ffn_up.weight", n_embd, n_ff)
        matrix(f"blk.{i}.ffn_down.weight", n_ff, n_embd)
    return _finish(writer, path)


def _random_q6_k(draw: np.random.Generator, n_out: int, n_in: int) -> NDArray[np.uint8]:
    """Random blocks of Q6_K: the low and high bits of 256 weights, 16 scales and a factor."""
    n = n_out * n_in // 256
    bits = draw.integers(0, 256, (n, 128 + 64), dtype=np.uint8)
    scales = draw.integers(0, 32, (n, 16), dtype=np.uint8)
    factor = np.full((n, 1), 0.0007, np.float16).view(np.uint8)
    return np.concatenate([bits, scales, factor], axis=1).reshape(n_out, -1)


def falcon(path: Path, *, n_layer: int = 2, n_embd: int = 64, n_head: int = 2, n_ctx: int = 256) -> Path:
    """Writes a GGUF falcon with a byte-pair vocabulary as the library reads it: raw bytes."""
    draw = np.random.default_rng(2)
    writer = gguf.GGUFWriter(str(path), "falcon")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(4 * n_embd)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_eps(1e-5)
    tokens = [bytes([i]) for i in range(1, 256)] + [b"<|endoftext|>", b"he", b"ll", b"hell"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_bos_token_id(255)
    writer.add_eos_token_id(255)
    n_vocab, n_qkv = len(tokens), n_embd + 2 * (n_embd // n_head)

    def matrix(name: str, n_in: int, n_out: int) -> None:
        data = (draw.standard_normal((n_out, n_in)) * 0.1).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(data, Q8_0), raw_dtype=Q8_0)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(n_embd, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(n_embd, np.float32))

    matrix("token_embd.weight", n_embd, n_vocab)
    norm("output_norm")
    matrix("output.weight", n_embd, n_vocab)
    for i in range(n_layer):
        norm(f"blk.{i}.attn_norm")
        matrix(f"blk.{i}.attn_qkv.weight", n_embd, n_qkv)
        matrix(f"blk.{i}.attn_output.weight", n_embd, n_embd)
        matrix(f"blk.{i}.ffn_up.weight", n_embd, 4 * n_embd)
        matrix(f"blk.{i}.ffn_down.weight", 4 * n_embd, n_embd)
    return _finish(writer, path)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gpt2_ggml(path: Path, *, n_layer: int = 2, n_embd: int = 64, n_head: int = 2, n_ctx: int = 128) -> Path:
    """Writes a legacy GGML gpt2 in F32."""
    draw = np.random.default_rng(3)
    vocabulary = [bytes([i]) for i in range(1, 256)] + [b"he", b"llo", b"<|endoftext|>"]
    n_vocab = len(vocabulary)
    with path.open("wb") as file:
        file.write(struct.pack("<I6i", 0x67676D6C, n_vocab, n_ctx, n_embd, n_head, n_layer, 0))
        file.write(struct.pack("<i", n_vocab))
        for token in vocabulary:
            file.write(struct.pack("<I", len(token)) + token)

        def tensor(name: str, data: NDArray[np.float32]) -> None:
            raw = name.encode()
            file.write(struct.pack("<3i", data.ndim, len(raw), 0))
            file.write(struct.pack(f"<{data.ndim}i", *reversed(data.shape)))
            file.write(raw + data.astype("<f4").tobytes())

        def matrix(name: str, n_in: int, n_out: int) -> None:
            tensor(name, (draw.standard_normal((n_out, n_in)) * 0.1).astype(np.float32))

        def vector(name: str, n: int, value: float) -> None:
            tensor(name, np.full(n, value, np.float32))

        vector("model/ln_f/g", n_embd, 1)
        vector("model/ln_f/b", n_embd, 0)
        matrix("model/wte", n_embd, n_vocab)
        matrix("model/wpe", n_embd, n_ctx)
        for i in range(n_layer):
            for ln in ("ln_1", "ln_2"):
                vector(f"model/h{i}/{ln}/g", n_embd, 1)
                vector(f"model/h{i}/{ln}/b", n_embd, 0)
            for name, n_in, n_out in (
                ("attn/c_attn", n_embd, 3 * n_embd),
                ("attn/c_proj", n_embd, n_embd),
                ("mlp/c_fc", n_embd, 4 * n_embd),
                ("mlp/c_proj", 4 * n_embd, n_embd),
            ):
                matrix(f"model/h{i}/{name}/w", n_in, n_out)
                vector(f"model/h{i}/{name}/b", n_out, 0)
    return path
