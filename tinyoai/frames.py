"""Frames of the protocol between processes: a 4-byte big-endian length, then that many bytes."""

import struct
from collections.abc import Iterable

MAX_FRAME = 64 << 20
"""Bytes. A longer frame means a broken peer."""

_LENGTH = struct.Struct(">I")
HEAD = _LENGTH.size
"""Bytes before a frame's body."""


class WireError(Exception):
    """The byte stream is not a sequence of frames of the expected messages."""


def pack(body: bytes) -> bytes:
    """One frame with this body. Raises WireError over MAX_FRAME."""
    if len(body) > MAX_FRAME:
        raise WireError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Splits a byte stream into frame bodies, however the bytes are cut."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def is_whole(self, data: bytes) -> bool:
        """The data is one whole frame, and nothing came before it."""
        if self._buffer or len(data) < HEAD:
            return False
        (length,) = _LENGTH.unpack_from(data)
        return bool(length == len(data) - HEAD <= MAX_FRAME)

    def bodies(self, data: bytes) -> Iterable[bytes]:
        self._buffer += data
        while len(self._buffer) >= HEAD:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise WireError(f"a frame claims {length} bytes; the limit is {MAX_FRAME}")
            end = HEAD + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[HEAD:end])
            del self._buffer[:end]
            yield body
