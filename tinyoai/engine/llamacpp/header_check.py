"""The checks of a header before llama.cpp reads the file: what its loader asserts on, or trusts."""

from array import array
from typing import Any

from tinyoai import gguf

MAX_LAYERS, MAX_EXPERTS = 512, 1024
"""Limits of llama.cpp itself."""
MAX_HEADS, MAX_WIDTH, MAX_CONTEXT = 4096, 1 << 20, 1 << 28


class HeaderError(Exception):
    """llama.cpp cannot run the file; the words follow the file's name."""


def check(header: gguf.Header) -> None:
    """Raises HeaderError if llama.cpp would refuse the file, or crash over it."""
    number(header, "context_length", MAX_CONTEXT)
    number(header, "embedding_length", MAX_WIDTH)
    number(header, "block_count", MAX_LAYERS)


def number(header: gguf.Header, key: str, most: int, *, least: int = 1, default: int | None = None) -> int:
    """A number of the header. Raises HeaderError if it is missing or out of bounds."""
    value = header.value(key, default)
    if type(value) is not int or not least <= value <= most:
        raise HeaderError(f"has no usable {key} in its header; convert the model again")
    return value


def numbers(header: gguf.Header, key: str, n: int, default: Any = 0) -> list[int]:
    """A number of each layer. The header has one for all, or an array."""
    value = header.value(key, default)
    if isinstance(value, array | list):
        return [int(item) for item in value][:n]
    return [int(value)] * n
