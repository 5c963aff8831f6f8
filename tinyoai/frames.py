"""Frames of the protocol between processes: a 4-byte big-endian length, then that many bytes."""

import struct

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
