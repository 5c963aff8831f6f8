"""Makes LoRA adapters: random matrices from a fixed seed for some matrices of a model, as a GGUF file.

`merged` writes the model that the adapter stands for: all its matrices in F32, the changes added.
"""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.architectures import packed, text
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
