"""The contents of a GGUF header and the errors of reading one."""

import math
from typing import Any, NamedTuple

import msgspec

from tinyoai.gguf.tensor_types import TENSOR_TYPES

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of `tokenizer.ggml.token_type`."""


class BadModelFile(Exception):
    """The file cannot be served; the message is a sentence with the reason and a remedy."""


class Unsupported(BadModelFile):
    """The file may be valid, but nothing here can read or run it."""


class NotAModel(BadModelFile):
    """The file is sound and belongs to a model, but is none."""


class Tensor(NamedTuple):
    """An entry of the tensor table. `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    size: int
    """Bytes; 0 if the type is not in TENSOR_TYPES."""

    @property
    def type_name(self) -> str:
        """The type's name, such as Q8_0; "type 99" if it is not known."""
        known = TENSOR_TYPES.get(self.type)
        return known.name if known else f"type {self.type}"


class Header(msgspec.Struct, kw_only=True):
    """Metadata and tensor table of a GGUF file."""

    path: str
    file_size: int
    """Bytes; of a model in several files, of all."""
    version: int
    metadata: dict[str, Any]
    """Strings are str; an array of strings is a list of bytes, of numbers an array.array, of bools a list."""
    tensors: dict[str, Tensor]
    alignment: int
    table_at: int
    """Offset of the tensor table in the file, in bytes."""
    data_at: int
    """Offset of the tensor data in the file, in bytes."""
    doubles: frozenset[str] = frozenset()
    """Keys of metadata values that are floats of 64 bits, where most readers want 32."""
    n_files: int = 1
    """Files that the model is split into; the tensors are of all, the offsets count in each."""

    @property
    def architecture(self) -> str:
        """The model family; empty if the file names none."""
        return str(self.metadata.get("general.architecture", ""))

    def value(self, key: str, default: Any = None) -> Any:
        """The metadata value of `ARCHITECTURE.key`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @property
    def role(self) -> str:
        """The file's purpose: "model", "projector", "adapter", "matrix", or another word that the file gives."""
        if self.architecture == "clip":
            return "projector"
        given = str(self.metadata.get("general.type", "model"))
        return {"mmproj": "projector", "imatrix": "matrix"}.get(given, given)

    @property
    def n_params(self) -> int:
        """Weights in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def quantization(self) -> str:
        """The name of the tensor type that holds the most bytes; "none" without tensors."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.size
        return max(sizes, key=lambda name: sizes[name]) if sizes else "none"
