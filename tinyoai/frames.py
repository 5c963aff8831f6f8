"""Frames of the protocol between processes: a 4-byte big-endian length, then that many bytes."""

import struct
from typing import Generic, TypeVar

import msgspec

MAX_FRAME = 64 << 20
"""Bytes. A longer frame means a broken peer."""

LENGTH = struct.Struct(">I")
"""The length of a frame's body."""
HEAD = LENGTH.size
"""Bytes before a frame's body."""


class WireError(Exception):
    """The byte stream is not a sequence of frames of the expected messages."""


def pack(body: bytes) -> bytes:
    """One frame with this body. Raises WireError over MAX_FRAME."""
    if len(body) > MAX_FRAME:
        raise WireError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME}")
    return LENGTH.pack(len(body)) + body


T = TypeVar("T")


class Reader(Generic[T]):
    """Decodes the frames of one direction, however the bytes are cut."""

    def __init__(self, decoder: "msgspec.msgpack.Decoder[list[T]]") -> None:
        self._decode = decoder.decode
        self._rest = bytearray()
        """The first bytes of a frame."""
        self._size = HEAD
        """Bytes that the rest must have before it is worth a look."""

    def feed(self, data: bytes) -> list[T]:
        """Returns the messages that these bytes complete, in order. Raises WireError for anything else."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._size:
                return []
            data = bytes(self._rest)
            self._rest.clear()
            self._size = HEAD
        found: list[T] = []
        view, begin, n = memoryview(data), 0, len(data)
        try:
            while n - begin >= HEAD:
                (length,) = LENGTH.unpack_from(data, begin)
                if length > MAX_FRAME:
                    raise WireError(f"a frame claims {length} bytes; the limit is {MAX_FRAME}")
                end = begin + HEAD + length
                if end > n:
                    self._size = end - begin
                    break
                found += self._decode(view[begin + HEAD : end])
                begin = end
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise WireError(f"not a message of this protocol: {error}") from error
        if begin < n:
            self._rest += view[begin:]
        return found
