"""The C module's hooks for libllama: an abort flag, a log, and a scan of the vocabulary.

`csrc/api.h` is their manual. Their addresses go to libllama, whose threads then never need the interpreter lock.
"""

import re
from typing import Any, NamedTuple

from tinyoai._native import ffi, lib  # type: ignore[import-not-found, import-untyped, unused-ignore]


def _address(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))


class Abort:
    """Ends a running evaluation, from any thread or at a time of CLOCK_MONOTONIC."""

    __slots__ = ("_flag", "address")

    callback = _address(ffi.addressof(lib, "toai_abort_asked"))
    """The address of the function that libllama asks."""

    def __init__(self) -> None:
        self._flag = ffi.new("toai_abort *")
        self.address = _address(self._flag)

    def arm(self, deadline: float) -> None:
        """Begins an evaluation that may last until `deadline` in seconds; 0: no deadline."""
        self._flag.asked = 0
        self._flag.deadline = deadline

    @property
    def asked(self) -> bool:
        """Whether `ask` was called since `arm`."""
        return bool(self._flag.asked)

    def ask(self) -> None:
        """Ends the running evaluation. Safe in any thread."""
        self._flag.asked = 1


_NO_REASON = ": failed to load model"
"""The end of the line that follows the reason why a model cannot be loaded."""
_REASON = re.compile(r"^.*error loading model(?: [a-z]+)?: ")
"""The reason follows it in its line."""


class Log:
    """The warnings and errors that the library writes."""

    __slots__ = ("_log", "address")

    callback = _address(ffi.addressof(lib, "toai_log_append"))
    """The address of the function that libllama calls."""

    def __init__(self) -> None:
        self._log = ffi.new("toai_log *")
        self.address = _address(self._log)

    def clear(self) -> None:
        """Forgets the text."""
        self._log.used = 0

    def last_line(self) -> str:
        """The last line that gives a reason, without control characters; empty if there is none."""
        n = min(int(self._log.used), int(lib.TOAI_LOG_BYTES))
        text = bytes(ffi.buffer(self._log.text, n)).decode("utf-8", "replace")
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and lines[-1].endswith(_NO_REASON):
            lines.pop()
        if lines:
            lines[-1] = _REASON.sub("", lines[-1])
        return "".join(c for c in lines[-1] if c.isprintable()) if lines else ""


EOG = int(lib.TOAI_KIND_EOG)
CONTROL = int(lib.TOAI_KIND_CONTROL)
USER = int(lib.TOAI_KIND_USER)
BYTE = int(lib.TOAI_KIND_BYTE)
LSTRIP = int(lib.TOAI_KIND_LSTRIP)
RSTRIP = int(lib.TOAI_KIND_RSTRIP)


class Kinds(NamedTuple):
    """The kinds of a vocabulary's tokens. `flags` holds the bits of each token."""

    flags: bytes
    longest_piece: int
    """Bytes."""

    def having(self, bits: int) -> list[int]:
        """The tokens that have one of the bits, in ascending order."""
        table = bytes(1 if flag & bits else 0 for flag in range(256))
        marked = self.flags.translate(table)
        found, at = [], marked.find(1)
        while at >= 0:
            found.append(at)
            at = marked.find(1, at + 1)
        return found


def scan_vocabulary(vocab: int, n_vocab: int, is_eog: int, attr: int, piece: int) -> Kinds:
    """The kinds of all tokens. All but `n_vocab` are addresses: a llama_vocab and functions of libllama."""
    calls = ffi.new("toai_vocab_calls *")
    calls.is_eog = ffi.cast("_Bool (*)(const void *, int32_t)", is_eog)
    calls.attr = ffi.cast("int (*)(const void *, int32_t)", attr)
    calls.piece = ffi.cast("int32_t (*)(const void *, int32_t, char *, int32_t, int32_t, _Bool)", piece)
    flags = ffi.new("uint8_t[]", n_vocab)
    longest = lib.toai_scan_vocab(calls, ffi.cast("void *", vocab), n_vocab, flags)
    if longest < 0:
        raise ValueError(f"a vocabulary of {n_vocab} tokens cannot be scanned")
    return Kinds(bytes(ffi.buffer(flags, n_vocab)), int(longest))
