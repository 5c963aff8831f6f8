"""Tensors of a GGUF file as float32, and new files with some tensors replaced. Metadata is copied unchanged."""

import errno
import math
import struct
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from tinyoai.gguf import TENSOR_TYPES, Header
from tinyoai.host import atomic

Array = NDArray[np.float32]

_F16, _Q8_0 = 1, 8
_WRITTEN = (0, 1, 2, 3, 6, 7, 8)
"""Types that `gguf` can quantize to. Tensors of other types become Q8_0."""


def read(header: Header, name: str) -> Array:
    """A tensor as float32. Dimensions are in numpy's order: a matrix is [n_out, n_in]."""
    tensor = header.tensors[name]
    raw = np.memmap(header.path, np.uint8, "r", offset=header.data_at + tensor.offset, shape=(tensor.size,))
    rows = raw.reshape(*tensor.shape[:0:-1], -1)
    values = dequantize(np.asarray(rows), GGMLQuantizationType(tensor.type))
    return np.array(values, np.float32).reshape(tensor.shape[::-1])


def written_type(header: Header, name: str) -> int:
    """The type number for writing a changed tensor: its own if `gguf` can quantize to that."""
    tensor = header.tensors[name]
    if tensor.type in _WRITTEN:
        return tensor.type
    return _Q8_0 if tensor.shape[0] % 32 == 0 else _F16


def write(header: Header, changed: Collection[str], values_of: Callable[[str], Array], path: Path) -> None:
    """Write a copy of a model file, complete or not at all, with `values_of(name)` for each name in `changed`.

    Raises OSError.
    """
    table, types, offset = bytearray(), {}, 0
    for name, tensor in header.tensors.items():
        kind = written_type(header, name) if name in changed else tensor.type
        _, block, block_size = TENSOR_TYPES[kind]
        size = math.prod(tensor.shape) // block * block_size
        types[name] = kind
        raw = name.encode()
        table += struct.pack("<Q", len(raw)) + raw + struct.pack("<I", len(tensor.shape))
        table += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape) + struct.pack("<IQ", kind, offset)
        offset += size + -size % header.alignment
    temporary = path.with_name(f".{path.name}.part")
    with open(header.path, "rb") as old, atomic.replacing(path, temporary) as new:
        new.write(old.read(header.table_at))
        new.write(table)
        new.write(bytes(-new.tell() % header.alignment))
        for name, tensor in header.tensors.items():
            if name in changed:
                values = quantize(np.ascontiguousarray(values_of(name)), GGMLQuantizationType(types[name]))
                new.write(np.ascontiguousarray(values).tobytes())
            else:
                old.seek(header.data_at + tensor.offset)
                left = tensor.size
                while left:
                    chunk = old.read(min(left, 1 << 24))
                    if not chunk:
                        raise OSError(errno.EIO, "the file was truncated while it was read", str(header.path))
                    new.write(chunk)
                    left -= len(chunk)
            new.write(bytes(-new.tell() % header.alignment))
