"""Parses a GGUF header. Every length, type, shape and offset is checked against the file."""

import math
import struct
import sys
from array import array
from pathlib import Path
from typing import Any

from tinyoai.gguf.file_kind import kind
from tinyoai.gguf.header import BadModelFile, Header, Tensor, Unsupported
from tinyoai.gguf.tensor_types import TENSOR_TYPES

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _DOUBLE = 8, 9, 12
_LENGTH = struct.Struct("<Q")

# limits far above every known model, so that a bad file cannot fill the server's memory
_MAX_HEADER = 256 << 20
_MAX_STRING = 16 << 20
_MAX_ITEMS = 1 << 22
_MAX_KV, _MAX_TENSORS = 4096, 1 << 18
_MAX_KEY, _MAX_NAME = 65_535, 255
_MAX_VALUES = 1 << 48


def read_header(path: Path) -> Header:
    """Reads metadata and tensor table. Raises OSError, BadModelFile or Unsupported."""
    if kind(path) != "gguf":
        raise BadModelFile(f"{path} is a legacy GGML file; name its architecture with --model-type")
    reader = _Reader(path)
    reader.take(4)
    version = reader.number("I")
    if version not in (2, 3):
        raise Unsupported(f"{path} is GGUF version {version}; versions 2 and 3 are supported")
    n_tensors, n_kv = reader.number("Q"), reader.number("Q")
    if not 0 < n_kv <= _MAX_KV or n_tensors > _MAX_TENSORS:
        raise _damaged(path, f"it claims {n_kv} metadata values and {n_tensors} tensors")
    metadata, doubles = _metadata(reader, n_kv)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise _damaged(path, "its alignment is not a power of two")
    _check_vocabulary(path, metadata)
    table_at = reader.at
    tensors = _tensors(reader, n_tensors, alignment)
    data_at = reader.at + (-reader.at) % alignment
    _check_data(path, tensors, max(0, reader.size - data_at))
    return Header(
        path=str(path),
        file_size=reader.size,
        version=version,
        metadata=metadata,
        tensors=tensors,
        alignment=alignment,
        table_at=table_at,
        data_at=data_at,
        doubles=doubles,
    )


class _Reader:
    """Reads a file in order and checks every length against the file's size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.at = 0
        with path.open("rb") as file:
            # 4 MiB hold most headers; files are read further only if a header is longer
            self._data = file.read(4 << 20)

    def take(self, n: int) -> memoryview:
        if n > self.size - self.at:
            raise BadModelFile(
                f"{self.path} is cut short or damaged: its header needs {n} bytes at {self.at} and the file "
                f"has {self.size}; copy or download it again"
            )
        end = self.at + n
        if end > _MAX_HEADER:
            raise _damaged(self.path, f"its header is longer than {_MAX_HEADER} bytes")
        if end > len(self._data):
            with self.path.open("rb") as file:
                self._data = file.read(max(end, 4 * len(self._data)))
            if end > len(self._data):
                raise BadModelFile(f"{self.path} became shorter while it was read; copy or download it again")
        view = memoryview(self._data)[self.at : end]
        self.at = end
        return view

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> bytes:
        n = self.number("Q")
        if n > _MAX_STRING:
            raise _damaged(self.path, f"a string claims {n} bytes")
        return bytes(self.take(n))

    def _strings(self, n: int) -> list[bytes]:
        """Reads n strings. A vocabulary has hundreds of thousands, so the loop makes no call where it can."""
        found: list[bytes] = []
        add, length_at = found.append, _LENGTH.unpack_from
        data, at, end = self._data, self.at, len(self._data)
        for _ in range(n):
            begin = at + 8
            if begin <= end:
                (length,) = length_at(data, at)
                if begin + length <= end and length <= _MAX_STRING:
                    at = begin + length
                    add(data[begin:at])
                    continue
            self.at = at
            add(self.string())  # reads more of the file, or raises
            data, at, end = self._data, self.at, len(self._data)
        self.at = at
        return found

    def value(self, type_: int) -> Any:
        if type_ in _SCALARS:
            return self.number(_SCALARS[type_])
        if type_ == _STRING:
            return self.string().decode("utf-8", "replace")
        if type_ == _ARRAY:
            return self._array()
        raise _damaged(self.path, f"value type {type_} does not exist")

    def _array(self) -> Any:
        type_, n = self.number("I"), self.number("Q")
        if type_ == _STRING:
            if n > (self.size - self.at) // 8:
                self.take(8 * n)  # raises: the file has no room for their lengths alone
            if n > _MAX_ITEMS:
                raise _damaged(self.path, f"an array claims {n} strings")
            return self._strings(n)
        if type_ == _ARRAY:
            raise Unsupported(f"{self.path} has nested arrays in its header, which are not supported")
        if type_ not in _SCALARS:
            raise _damaged(self.path, f"value type {type_} does not exist")
        code = _SCALARS[type_]
        raw = self.take(n * struct.calcsize("<" + code))
        if code == "?":
            return [bool(byte) for byte in raw]
        values = array(code, bytes(raw))
        if sys.byteorder == "big":
            values.byteswap()
        return values


def _metadata(reader: _Reader, n_kv: int) -> tuple[dict[str, Any], frozenset[str]]:
    """All values by key, and the keys of the floats of 64 bits."""
    metadata: dict[str, Any] = {}
    doubles: set[str] = set()
    for _ in range(n_kv):
        raw = reader.string()
        if not 0 < len(raw) <= _MAX_KEY or not all(32 < byte < 127 for byte in raw):
            raise _damaged(reader.path, "its header has a key that is not a name")
        key = raw.decode()
        if key in metadata:
            raise _damaged(reader.path, f"the key {key} occurs twice")
        type_ = reader.number("I")
        metadata[key] = reader.value(type_)
        if type_ == _DOUBLE:
            doubles.add(key)
    return metadata, frozenset(doubles)


def _check_vocabulary(path: Path, metadata: dict[str, Any]) -> None:
    """Checks the parallel arrays of a vocabulary. Byte-pair vocabularies have token types without scores."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return
    if not isinstance(tokens, list) or not all(isinstance(token, bytes) for token in tokens):
        raise _damaged(path, "its vocabulary is not an array of strings")
    for name, codes in (("scores", "fd"), ("token_type", "bBhHiIqQ")):
        values = metadata.get(f"tokenizer.ggml.{name}")
        if values is None:
            continue
        if not isinstance(values, array) or values.typecode not in codes or len(values) != len(tokens):
            raise _damaged(path, f"its {name} do not match its {len(tokens)} tokens")


def _tensors(reader: _Reader, n: int, alignment: int) -> dict[str, Tensor]:
    path = reader.path
    tensors: dict[str, Tensor] = {}
    for _ in range(n):
        raw = reader.string()
        name = raw.decode("utf-8", "replace")
        n_dims = reader.number("I")
        if not 1 <= n_dims <= 4 or len(raw) > _MAX_NAME or name in tensors:
            raise _damaged(
                path, f"the tensor {name[:64]!r} has {n_dims} dimensions, too long a name, or occurs twice"
            )
        shape = tuple(reader.number("Q") for _ in range(n_dims))
        type_, offset = reader.number("I"), reader.number("Q")
        n_values, known = math.prod(shape), TENSOR_TYPES.get(type_)
        if n_values > _MAX_VALUES or offset % alignment or (known and shape[0] % known.block):
            raise _damaged(path, f"the tensor {name} has an impossible shape or offset")
        size = n_values // known.block * known.block_bytes if known else 0
        tensors[name] = Tensor(name, shape, type_, offset, size)
    return tensors


def _check_data(path: Path, tensors: dict[str, Tensor], n_data: int) -> None:
    """Checks that tensors lie inside the data and do not overlap. Of an unknown type only the start is known."""
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.size and tensor.offset < end:
            raise _damaged(path, f"the tensor {tensor.name} overlaps another")
        end = max(end, tensor.offset + tensor.size)
    if end > n_data:
        raise BadModelFile(
            f"{path} is cut short: its header describes {end} bytes of weights and the file has "
            f"{n_data}; copy or download it again"
        )


def _damaged(path: Path, what: str) -> BadModelFile:
    return BadModelFile(f"{path} is damaged: {what}; copy or download it again")
