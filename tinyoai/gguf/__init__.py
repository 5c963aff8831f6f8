"""Reads GGUF headers: metadata and the tensor table, with the checks that hold for every model family.

It judges no model: whether an engine can run a file is in `engine/NAME/facts.py`. Tensor data is not read.
"""

from tinyoai.gguf.file_kind import kind
from tinyoai.gguf.header import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    BadModelFile,
    Header,
    NotAModel,
    Tensor,
    Unsupported,
)
from tinyoai.gguf.parts import existing_parts, part_paths, read_header, stem
from tinyoai.gguf.tensor_types import TENSOR_TYPES, TensorType

__all__ = [
    "BYTE",
    "CONTROL",
    "NORMAL",
    "TENSOR_TYPES",
    "UNKNOWN",
    "UNUSED",
    "USER_DEFINED",
    "BadModelFile",
    "Header",
    "NotAModel",
    "Tensor",
    "TensorType",
    "Unsupported",
    "existing_parts",
    "kind",
    "part_paths",
    "read_header",
    "stem",
]
