"""Reads a model file's header, and says whether an engine may be let near the file.

Owns what a sound GGUF file is: every length, type, shape and offset is checked against the file before a
library sees it, since the libraries crash on what is wrong or, worse, answer wrongly. Pure but for reading
the file it is given; it must not know engines. Data inside tensors is not looked at: only a digest could.
"""

import re
import struct
import sys
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

MAGIC = b"GGUF"
_LEGACY = {0x67676D6C: "ggml", 0x67676D66: "ggmf", 0x67676A74: "ggjt"}
ARCHITECTURES = ("llama", "falcon")
"""What the engine's library runs as GGUF."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEY = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_MAX_KV, _MAX_TENSORS, _MAX_DEPTH = 4096, 65_536, 1
_MAX_STRING = 16 << 20

TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
}  # fmt: skip
"""Type number to name, values in a block, bytes of a block."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types."""


class BadModelFile(Exception):
    """The file is not a sound model; one sentence says what is wrong and what to do."""


class Unsupported(BadModelFile):
    """The file is sound, but not for this engine."""


class Tensor(NamedTuple):
    """An entry of the tensor table. `offset` counts from the start of the data; sizes are in bytes."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    size: int


class Header(msgspec.Struct, kw_only=True):
    """What stands before the tensors' data."""

    path: str
    file_size: int
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    alignment: int
    table_at: int
    """Where the tensor table begins, in bytes from the file's start; and where the data does."""
    data_at: int

    @property
    def architecture(self) -> str:
        """The model's family."""
        return str(self.metadata.get("general.architecture", ""))

    def value(self, key: str, default: Any = None) -> Any:
        """A value under the architecture's own prefix."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @property
    def n_params(self) -> int:
        """Weights in all tensors."""
        total = 0
        for tensor in self.tensors.values():
            count = 1
            for n in tensor.shape:
                count *= n
            total += count
        return total

    @property
    def quantization(self) -> str:
        """The type that holds the most bytes."""
        sizes: dict[int, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.size
        return TENSOR_TYPES[max(sizes, key=lambda kind: sizes[kind])][0] if sizes else "none"


def kind(path: Path) -> str:
    """ "gguf" or "legacy". Raises BadModelFile for anything else, naming what it looks like."""
    if path.is_dir():
        raise BadModelFile(f"{path} is a directory; name a model file in it")
    if not path.is_file():
        raise BadModelFile(f"{path} is not a regular file; name a GGUF file")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise BadModelFile(f"{path} is empty; copy or download it again")
    if start.startswith(MAGIC):
        return "gguf"
    if len(start) >= 4 and struct.unpack("<I", start[:4])[0] in _LEGACY:
        return "legacy"
    raise BadModelFile(f"{path} {_looks_like(start)}; convert the model to GGUF or name another file")


def _looks_like(start: bytes) -> str:
    if start.startswith(MAGIC[::-1]):
        return "is a GGUF file in big-endian order, which is not read here"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "looks like a PyTorch checkpoint, not like a GGUF file"
    if len(start) > 9 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < 1 << 30:
        return "looks like a safetensors file, not like a GGUF file"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself"
    if start.lstrip()[:1] in (b"<", b"{") or all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in start):
        return "is a text file, not a GGUF file"
    return "is not a GGUF file"


# -- reading ---------------------------------------------------------------------------------------


class _Reader:
    """Bytes of the file in order; every length is held against what the file still has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.at = 0
        with path.open("rb") as file:
            # headers are small beside their files: read what most need, and the rest only if asked for
            self._data = file.read(4 << 20)

    def take(self, n: int) -> memoryview:
        if n > self.size - self.at:
            raise BadModelFile(
                f"{self.path} is cut short or damaged: its header asks for {n} bytes at {self.at} and the file "
                f"has {self.size}; copy or download it again"
            )
        end = self.at + n
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
            raise BadModelFile(
                f"{self.path} is damaged: a string claims {n} bytes; copy or download it again"
            )
        return bytes(self.take(n))

    def value(self, kind_: int, depth: int = 0) -> Any:
        if kind_ in _SCALARS:
            return self.number(_SCALARS[kind_])
        if kind_ == _STRING:
            return self.string().decode("utf-8", "replace")
        if kind_ == _ARRAY and depth < _MAX_DEPTH:
            return self._array(depth)
        raise BadModelFile(
            f"{self.path} is damaged: there is no value type {kind_}; copy or download it again"
        )

    def _array(self, depth: int) -> Any:
        kind_, n = self.number("I"), self.number("Q")
        if kind_ == _STRING:
            if n > (self.size - self.at) // 8:
                self.take(8 * n)  # raises: not even the lengths would fit
            return [self.string() for _ in range(n)]
        if kind_ not in _SCALARS:
            return [self.value(kind_, depth + 1) for _ in range(n)]
        code = _SCALARS[kind_]
        raw = self.take(n * struct.calcsize("<" + code))
        if code == "?":
            return [bool(byte) for byte in raw]
        found = array(code if code != "I" else "I", bytes(raw))
        if sys.byteorder == "big":
            found.byteswap()
        return found


def read_header(path: Path) -> Header:
    """Reads the header and tensor table. Raises BadModelFile for what is structurally wrong."""
    if kind(path) != "gguf":
        raise BadModelFile(f"{path} is a legacy GGML file; say which architecture it has with --model-type")
    reader = _Reader(path)
    reader.take(4)
    version = reader.number("I")
    if version not in (2, 3):
        raise BadModelFile(f"{path} is GGUF version {version}; versions 2 and 3 are read here")
    n_tensors, n_kv = reader.number("Q"), reader.number("Q")
    if not 0 < n_kv <= _MAX_KV or not 0 < n_tensors <= _MAX_TENSORS:
        raise _damaged(path, f"it claims {n_kv} values and {n_tensors} tensors")
    metadata: dict[str, Any] = {}
    for _ in range(n_kv):
        raw = reader.string()
        if len(raw) > 256 or not _KEY.fullmatch(raw):
            raise _damaged(path, "a key of its header is no name")
        key = raw.decode()
        if key in metadata:
            raise _damaged(path, f"the key {key} comes twice")
        metadata[key] = reader.value(reader.number("I"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise _damaged(path, "its alignment is no power of two")
    table_at = reader.at
    tensors = _tensors(reader, n_tensors, alignment)
    data_at = reader.at + (-reader.at) % alignment
    _inside(path, tensors, reader.size - data_at)
    return Header(
        path=str(path),
        file_size=reader.size,
        version=version,
        metadata=metadata,
        tensors=tensors,
        alignment=alignment,
        table_at=table_at,
        data_at=data_at,
    )


def _tensors(reader: _Reader, n: int, alignment: int) -> dict[str, Tensor]:
    path = reader.path
    tensors: dict[str, Tensor] = {}
    for _ in range(n):
        name = reader.string().decode("utf-8", "replace")
        n_dims = reader.number("I")
        if not 1 <= n_dims <= 4 or len(name) > 64 or name in tensors:
            raise _damaged(
                path, f"the tensor {name[:64]!r} has {n_dims} dimensions, too long a name, or comes twice"
            )
        shape = tuple(reader.number("Q") for _ in range(n_dims))
        type_, offset = reader.number("I"), reader.number("Q")
        if type_ not in TENSOR_TYPES:
            raise Unsupported(
                f"{path} holds the tensor {name} in a type ({type_}) that ctransformers does not know; "
                "choose a file in F16, Q8_0 or one of Q2_K to Q6_K"
            )
        _, block, block_size = TENSOR_TYPES[type_]
        count = 1
        for length in shape:
            count *= length
        if not 0 < count <= 1 << 48 or shape[0] % block or offset % alignment:
            raise _damaged(path, f"the tensor {name} has an impossible shape or place")
        tensors[name] = Tensor(name, shape, type_, offset, count // block * block_size)
    return tensors


def _inside(path: Path, tensors: dict[str, Tensor], n_data: int) -> None:
    end = 0
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset < end:
            raise _damaged(path, f"the tensor {tensor.name} overlaps another")
        end = tensor.offset + tensor.size
    if end > n_data:
        raise BadModelFile(
            f"{path} is cut short: its header promises {end} bytes of weights and the file has {max(0, n_data)}; "
            "copy or download it again"
        )


def _damaged(path: Path, what: str) -> BadModelFile:
    return BadModelFile(f"{path} is damaged: {what}; copy or download it again")


# -- checking ----------------------------------------------------------------------------------------


def check(header: Header) -> None:
    """Raises BadModelFile or Unsupported unless ctransformers can run the file without harm."""
    path, arch = Path(header.path), header.architecture
    if not arch:
        raise _damaged(path, "it does not say its architecture")
    if arch not in ARCHITECTURES:
        raise Unsupported(
            f"{path} is a model of the architecture {arch[:40]!r}, which ctransformers does not run; it runs GGUF "
            "files of llama (Llama 2, Mistral and their kin) and falcon, and newer ones need a llama.cpp engine"
        )
    n_vocab = _check_vocabulary(header)
    n_embd = _count(header, "embedding_length", 1 << 20)
    n_layer = _count(header, "block_count", 4096)
    n_head = _count(header, "attention.head_count", 4096)
    n_head_kv = _count(header, "attention.head_count_kv", 4096, n_head)
    _count(header, "context_length", 1 << 26)
    if n_embd % n_head or n_head % n_head_kv or (n_embd // n_head) % 2:
        raise _damaged(path, "its heads do not divide its width")
    epsilon = header.value(
        "attention.layer_norm_rms_epsilon" if arch == "llama" else "attention.layer_norm_epsilon"
    )
    if type(epsilon) is not float or not 0 < epsilon < 1:
        raise _damaged(path, "its norm's epsilon is missing or no small number")
    n_rot = header.value("rope.dimension_count", n_embd // n_head)
    if n_rot != n_embd // n_head:
        raise _damaged(path, "its rotary dimension is not its heads' width")
    n_gqa = n_embd // n_head * n_head_kv
    n_ff = _count(header, "feed_forward_length", 1 << 22)
    if arch == "llama":
        _check_llama(header, n_vocab, n_embd, n_layer, n_gqa, n_ff)
    else:
        _check_falcon(header, n_vocab, n_embd, n_layer, n_gqa)


def _count(header: Header, key: str, most: int, default: int | None = None) -> int:
    value = header.value(key, default)
    if type(value) is not int or not 0 < value <= most:
        raise _damaged(Path(header.path), f"its {key} is missing or out of range")
    return value


def _check_vocabulary(header: Header) -> int:
    path, get = Path(header.path), header.metadata.get
    model, tokens = get("tokenizer.ggml.model"), get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, bytes) for token in tokens):
        raise _damaged(path, "it has no vocabulary")
    n = len(tokens)
    if model not in ("llama", "gpt2"):
        raise Unsupported(f"{path} has a tokenizer ({str(model)[:40]!r}) that ctransformers does not know")
    scores, types = get("tokenizer.ggml.scores"), get("tokenizer.ggml.token_type")
    _aligned(path, "scores", scores, n, "f")
    _aligned(path, "token_type", types, n, "i")
    for key in ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id", "separator_token_id"):
        token = get(f"tokenizer.ggml.{key}")
        if token is not None and (type(token) is not int or not 0 <= token < n):
            raise _damaged(path, f"its {key} is not in the vocabulary")
    known = set(tokens)
    if model == "llama":
        if not all(b"<0x%02X>" % byte in known for byte in range(256)):
            raise Unsupported(
                f"{path} has a vocabulary without all byte tokens; ctransformers would crash on it"
            )
    elif header.architecture == "llama":
        raise Unsupported(
            f"{path} has a byte-pair vocabulary, as Llama 3 and its kin do, and ctransformers would misread it; "
            "choose a Llama 2 or Mistral file, or a llama.cpp engine"
        )
    elif not all(bytes([byte]) in known for byte in range(1, 256)):
        raise Unsupported(
            f"{path} writes its vocabulary as converters do since October 2023, and ctransformers would crash on it; "
            "choose an older falcon file or a llama.cpp engine"
        )
    if model == "gpt2" and not isinstance(get("tokenizer.ggml.merges"), list):
        raise _damaged(path, "its byte-pair vocabulary has no merges")
    return n


def _aligned(path: Path, what: str, found: Any, n: int, code: str) -> None:
    if not isinstance(found, array) or found.typecode != code or len(found) != n:
        raise _damaged(path, f"its {what} do not go with its {n} tokens")


def _check_llama(header: Header, n_vocab: int, n_embd: int, n_layer: int, n_gqa: int, n_ff: int) -> None:
    _norm(header, "output_norm.weight", n_embd)
    for name in ("token_embd.weight", "output.weight"):
        _matrix(header, name, n_embd, n_vocab)
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
            _matrix(header, f"blk.{i}.{name}.weight", n_in, n_out)


def _check_falcon(header: Header, n_vocab: int, n_embd: int, n_layer: int, n_gqa: int) -> None:
    for part in ("weight", "bias"):
        _norm(header, f"output_norm.{part}", n_embd)
        for i in range(n_layer):
            _norm(header, f"blk.{i}.attn_norm.{part}", n_embd)
    for name in ("token_embd.weight", "output.weight"):
        _matrix(header, name, n_embd, n_vocab)
    for i in range(n_layer):
        for name, n_in, n_out in (
            ("attn_qkv", n_embd, n_embd + 2 * n_gqa),
            ("attn_output", n_embd, n_embd),
            ("ffn_up", n_embd, 4 * n_embd),
            ("ffn_down", 4 * n_embd, n_embd),
        ):
            _matrix(header, f"blk.{i}.{name}.weight", n_in, n_out)


def _norm(header: Header, name: str, n: int) -> None:
    _shaped(header, name, (n,))
    if header.tensors[name].type != 0:
        raise _damaged(Path(header.path), f"the tensor {name} is not in F32")


def _matrix(header: Header, name: str, n_in: int, n_out: int) -> None:
    _shaped(header, name, (n_in, n_out))


def _shaped(header: Header, name: str, shape: tuple[int, ...]) -> None:
    tensor = header.tensors.get(name)
    if tensor is None:
        raise Unsupported(f"{header.path} has no tensor {name}, without which ctransformers cannot run it")
    if tensor.shape != shape:
        raise _damaged(
            Path(header.path), f"the tensor {name} has the shape {tensor.shape} instead of {shape}"
        )
