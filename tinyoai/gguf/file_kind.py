"""Tells model files from other files by their first bytes."""

import struct
from pathlib import Path

from tinyoai.gguf.header import BadModelFile

MAGIC = b"GGUF"
_LEGACY = {0x67676D6C: "ggml", 0x67676D66: "ggmf", 0x67676A74: "ggjt"}


def kind(path: Path) -> str:
    """Returns "gguf" or "legacy". Raises BadModelFile, which names the likely format, for any other file."""
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
    raise BadModelFile(f"{path} {_likely_format(start)}; convert the model to GGUF or name another file")


def _likely_format(start: bytes) -> str:
    if start.startswith(MAGIC[::-1]):
        return "is a GGUF file in big-endian byte order, which is not supported"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "looks like a PyTorch checkpoint, not like a GGUF file"
    if len(start) > 9 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < 1 << 30:
        return "looks like a safetensors file, not like a GGUF file"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the model itself"
    if start.lstrip()[:1] in (b"<", b"{") or all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in start):
        return "is a text file, not a GGUF file"
    return "is not a GGUF file"
