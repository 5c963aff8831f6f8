"""The C functions of ctransformers' shared library and the handles that it gives out.

The package's Python code is never imported; its library is opened directly. Callers check every argument first:
the library checks none.
"""

import ctypes
import importlib.util
import os
import platform
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _cffi_backend

from tinyoai.engine.contract import EngineError
from tinyoai.engine.ctransformers.exact_prefix import ExactPrefix

VERSION = "0.2.27"
MAX_HANDLES = 30
"""The library's table of contexts has 64 places, and a handle takes two."""

_EVAL = "_Bool(*)(void *, int *, int, int, int, int)"
_ffi = _cffi_backend.FFI()


class Config(ctypes.Structure):
    """The C struct of load options."""

    _fields_ = (
        ("context_length", ctypes.c_int),
        ("gpu_layers", ctypes.c_int),
        ("mmap", ctypes.c_bool),
        ("mlock", ctypes.c_bool),
    )


def library_path(gpu: bool) -> Path:
    """The library's variant for this processor. Raises EngineError with what to install."""
    spec = importlib.util.find_spec("ctransformers")
    if spec is None or spec.origin is None:
        raise EngineError(
            f"the package ctransformers is not installed; run: pip install ctransformers=={VERSION}"
        )
    root = Path(spec.origin).parent / "lib"
    if gpu:
        names = ["cuda"]
    else:
        names = ["local"]
        if platform.machine() in ("x86_64", "AMD64"):
            names += _x86_variants()
    for name in names:
        path = root / name / "libctransformers.so"
        if path.is_file():
            return path
    raise EngineError(
        "ctransformers has no library for this machine; build one: "
        f"pip install --no-binary ctransformers --force-reinstall ctransformers=={VERSION}"
    )


def _x86_variants() -> list[str]:
    flags: set[str] = set()
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        flags = set(found[1].split()) if found else set()
    except OSError:
        pass  # without /proc only the variant for every processor is safe
    if {"avx2", "fma", "f16c"} <= flags:
        return ["avx2", "avx", "basic"]
    return ["avx", "basic"] if {"avx", "f16c"} <= flags else ["basic"]


class Library:
    """The opened library. Raises EngineError if it cannot be opened."""

    def __init__(self, gpu: bool) -> None:
        path = library_path(gpu)
        try:
            lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise EngineError(
                f"ctransformers' library {path.parent.name} cannot be opened: {error}"
            ) from None
        c, p = ctypes, ctypes.c_void_p
        for name, result, arguments in (
            ("create", p, (c.c_char_p, c.c_char_p, Config)),
            ("delete", None, (p,)),
            ("tokenize", c.c_int, (p, c.c_char_p, c.c_bool, p)),
            ("detokenize", c.c_char_p, (p, c.c_int)),
            ("eos_token_id", c.c_int, (p,)),
            ("vocab_size", c.c_int, (p,)),
            ("logits_data", p, (p,)),
            ("logits_size", c.c_int, (p,)),
            ("embeddings_data", p, (p,)),
            ("embeddings_size", c.c_int, (p,)),
        ):
            function = getattr(lib, f"ctransformers_llm_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        # the hot call goes through cffi: a tenth of ctypes' cost, and the logits stay a cffi pointer
        address = c.cast(lib.ctransformers_llm_batch_eval, p).value
        self.batch_eval = _ffi.cast(_EVAL, address)
        self._lib = lib

    create: Any
    delete: Any
    tokenize: Any
    detokenize: Any
    eos_token_id: Any
    vocab_size: Any
    logits_data: Any
    logits_size: Any
    embeddings_data: Any
    embeddings_size: Any


class Loader:
    """Loads handles of one model file with the same options."""

    def __init__(self, library: Library, path: Path, model_type: str, n_ctx: int, n_gpu_layers: int) -> None:
        self._library = library
        self._arguments = (os.fsencode(path), model_type.encode(), Config(n_ctx, n_gpu_layers, True, False))

    def load(self, n_row: int) -> "Handle | None":
        """A handle for rows of up to n_row tokens; None if the library cannot load the file."""
        address = self._library.create(*self._arguments)
        return Handle(self._library, address, n_row) if address else None


class Handle:
    """One loaded copy of the model's state: one KV sequence. A lock is held over every call on it."""

    __slots__ = (
        "_library",
        "_lock",
        "_n_embd",
        "_n_vocab",
        "_pointer",
        "_states",
        "_tokens",
        "address",
        "all_logits",
        "all_states",
        "exact",
        "logits",
        "n_past",
    )

    def __init__(self, library: Library, address: int, n_row: int) -> None:
        self.address = address
        self.n_past = 0
        """Positions evaluated; the library itself would accept any position."""
        self.exact = ExactPrefix()
        self.logits: Any = None
        """The library's own `float *`: logits of the last token. None before the first evaluation."""
        self.all_logits: Any = None
        self.all_states: Any = None
        self._library = library
        self._pointer = _ffi.cast("void *", address)
        self._lock = threading.Lock()
        self._tokens = _ffi.new("int[]", n_row)
        self._states: Any = None
        self._n_vocab = self._n_embd = 0

    # -- evaluating --------------------------------------------------------------------------------

    def eval(self, tokens: Sequence[int], n_threads: int) -> None:
        """Appends tokens in one call. Raises EngineError."""
        n = len(tokens)
        self._tokens[0:n] = tokens
        with self._lock:
            self._eval(0, n, n_threads)

    def eval_each(self, tokens: Sequence[int], n_threads: int, n_outputs: int, states: bool) -> None:
        """Appends tokens one by one and keeps the logits of each in `all_logits`, or the states in `all_states`.

        The library has outputs of the last token of a call alone. Raises EngineError.
        """
        n = len(tokens)
        self._tokens[0:n] = tokens
        with self._lock:
            for at in range(n):
                self._eval(at, 1, n_threads)
                if states:
                    self._copy_state(at, n_outputs)
                else:
                    if self.all_logits is None:
                        self.all_logits = _ffi.new("float[]", n_outputs * self._n_vocab)
                    _ffi.memmove(self.all_logits + at * self._n_vocab, self.logits, 4 * self._n_vocab)

    def _eval(self, at: int, n: int, n_threads: int) -> None:
        if not self._library.batch_eval(self._pointer, self._tokens + at, n, self.n_past, n, n_threads):
            raise EngineError("the library could not evaluate these tokens")
        self.n_past += n
        self.exact.append(n)
        if self.logits is None:
            self._n_vocab = int(self._library.vocab_size(self.address))
            if self._library.logits_size(self.address) != self._n_vocab:
                raise EngineError("the library has no logits for its vocabulary")
            self.logits = _ffi.cast("float *", self._library.logits_data(self.address))

    def _copy_state(self, at: int, n_outputs: int) -> None:
        if self._states is None:
            self._n_embd = self.n_embd()
            if not self._n_embd:
                raise EngineError("the library has no hidden states of this model")
            self._states = _ffi.cast("float *", self._library.embeddings_data(self.address))
            self.all_states = _ffi.new("float[]", n_outputs * self._n_embd)
        _ffi.memmove(self.all_states + at * self._n_embd, self._states, 4 * self._n_embd)

    def token_logits(self, at: int) -> Any:
        """A `float *` of the logits that `eval_each` kept of token number `at`."""
        return self.all_logits + at * self._n_vocab

    def token_states(self, n: int) -> Any:
        """A buffer of the states that `eval_each` kept of the first n tokens."""
        return _ffi.buffer(self.all_states, 4 * self._n_embd * n)

    def copy_logits(self) -> list[float]:
        """The logits of the last token, as Python numbers."""
        return list(_ffi.unpack(self.logits, self._n_vocab))

    def truncate(self, n: int) -> int:
        """Drops all but the first n positions; returns how many are kept."""
        self.n_past = max(0, min(n, self.n_past))
        self.exact.truncate(self.n_past)
        return self.n_past

    # -- facts and text ----------------------------------------------------------------------------

    def n_embd(self) -> int:
        """Numbers in a hidden state, known after an evaluation; 0 for architectures that keep none."""
        return max(0, int(self._library.embeddings_size(self.address)))

    def n_vocab(self) -> int:
        """Entries in the vocabulary."""
        return int(self._library.vocab_size(self.address))

    def eos_id(self) -> int:
        """The token that ends a text."""
        return int(self._library.eos_token_id(self.address))

    def piece(self, token: int) -> bytes:
        """A token's bytes as the library has them."""
        return bytes(self._library.detokenize(self.address, token))

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, control tokens not prevented. Safe beside `eval`, but not beside itself."""
        if not text:
            return []
        raw = text.encode()
        # at most one token for each byte and three for each space; the library is given no size
        size = 4 * len(raw) + 16
        buffer = (ctypes.c_int * size)()
        n = self._library.tokenize(self.address, raw, False, ctypes.byref(buffer))
        if not 0 <= n <= size:
            os.abort()  # memory beyond the buffer was written: nothing in this process can be trusted any more
        return list(buffer[:n])

    def close(self) -> None:
        """Frees the handle once no call runs on it."""
        with self._lock:
            self._library.delete(self.address)
