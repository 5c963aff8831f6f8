"""Makes LoRA adapters: random matrices from a fixed seed for some matrices of a model, as a GGUF file.

`in_f32` writes a model with all its weights in F32, and with the changes of an adapter added to them if there is one.
"""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.architectures import metadata, packed, text
from tinyoai import gguf as reader

F32 = gguf.GGMLQuantizationType.F32
TARGETS = ("attn_q", "attn_v", "attn_output", "ffn_down", "ffn_up")
"""Matrices of each layer that an adapter changes."""
RANK = 4

Tensors = dict[str, tuple[tuple[int, ...], int, bytes]]
"""By name: dimensions in the file's order, type and bytes."""


def values(model: reader.Header, **changes: Any) -> dict[str, bytes]:
    """The metadata of an adapter of a model, packed; a change of None leaves a key out."""
    made = {
        "general.architecture": model.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return {
        key: value if isinstance(value, bytes) else packed(value)
        for key, value in made.items()
        if value is not None
    }


def pairs(
    model: reader.Header,
    *,
    seed: int = 1,
    rank: int = RANK,
    spread: float = 0.3,
    targets: Sequence[str] = TARGETS,
) -> Tensors:
    """Two matrices for each target of each layer."""
    found: Tensors = {}
    for name, tensor in model.tensors.items():
        if len(tensor.shape) != 2 or not any(name.endswith(f".{target}.weight") for target in targets):
            continue
        n_in, n_out = tensor.shape
        draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
        a = draw.standard_normal((rank, n_in), dtype=np.float32) * np.float32(n_in**-0.5)
        b = draw.standard_normal((n_out, rank), dtype=np.float32) * np.float32(spread * rank**-0.5)
        found[f"{name}.lora_a"] = (n_in, rank), F32, a.tobytes()
        found[f"{name}.lora_b"] = (rank, n_out), F32, b.tobytes()
    assert found, "the model has none of the targets"
    return found


def write(path: Path, metadata: dict[str, bytes], tensors: Tensors) -> Path:
    """Writes a GGUF file and returns its path."""
    head = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    head += [text(key) + raw for key, raw in metadata.items()]
    data, at = [], 0
    for name, (shape, kind, raw) in tensors.items():
        head.append(
            text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}QIQ", *shape, kind, at)
        )
        data.append(raw + bytes(-len(raw) % 32))
        at += len(data[-1])
    header = b"".join(head)
    path.write_bytes(b"".join([header, bytes(-len(header) % 32), *data]))
    return path


def adapter(path: Path, model: Path, **options: Any) -> Path:
    """Writes a random adapter of a model and returns its path; `options` are those of `pairs`."""
    header = reader.read_header(model)
    return write(path, values(header), pairs(header, **options))


def for_embedding(model: reader.Header, *, seed: int = 1, rank: int = RANK) -> Tensors:
    """The two matrices of the embedding, whose sides are in another order: rows of A are looked up by token."""
    n_embd, n_vocab = model.tensors["token_embd.weight"].shape
    draw = np.random.default_rng(seed)
    a = draw.standard_normal((n_vocab, rank), dtype=np.float32)
    b = draw.standard_normal((n_embd, rank), dtype=np.float32)
    return {
        "token_embd.weight.lora_a": ((rank, n_vocab), F32, a.tobytes()),
        "token_embd.weight.lora_b": ((rank, n_embd), F32, b.tobytes()),
    }


def in_f32(path: Path, model: Path, changes: Tensors | None = None, factor: float = 1.0) -> Path:
    """Writes the model in F32 with `factor` times the changes added, and returns its path."""
    header, raw, tensors = reader.read_header(model), model.read_bytes(), Tensors()
    for name, tensor in header.tensors.items():
        begin = header.data_at + tensor.offset
        data = np.frombuffer(raw[begin : begin + tensor.size], np.uint8)
        weights = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(tensor.type))
        weights = weights.reshape(tensor.shape[::-1]).astype(np.float64)
        if changes is not None and f"{name}.lora_a" in changes:
            a, b = (_array(*changes[name + end]) for end in (".lora_a", ".lora_b"))
            weights += factor * (a @ b.T if name == "token_embd.weight" else b @ a)
        tensors[name] = tensor.shape, F32, weights.astype(np.float32).tobytes()
    return write(path, metadata(model), tensors)


def _array(shape: tuple[int, ...], kind: int, raw: bytes) -> NDArray[np.float64]:
    assert kind == F32
    return np.frombuffer(raw, np.float32).reshape(shape[::-1]).astype(np.float64)
