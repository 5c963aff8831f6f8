"""The engine over ctransformers' shared library: the only caller of its C functions.

Owns the handles, one for each slot, and every check without which the library crashes, reads memory that
is not its own, or answers from another request's numbers: counts, ids, positions, texts, files, memory. The
package's Python code is never imported; its library is opened directly. It must not know requests.
"""

import ctypes
import importlib.util
import math
import os
import platform
import queue
import re
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _cffi_backend
from msgspec import structs

from tinyoai import gguf
from tinyoai.engine.contract import EngineError, ModelInfo, ModelRefused, Row
from tinyoai.engine.threads import available
from tinyoai.host import memory

BLOCK = 32
"""The library sums attention over this many positions at once, and what is left over one by one."""
MAX_BATCH = 512
"""Its compute buffer is measured for so many tokens; more end the process."""
MAX_HANDLES = 30
"""Its table of contexts has 64 places, and a handle takes two."""
DEFAULT_CTX = 4096
MAX_BPE_TEXT = 2000
"""Characters given at once to a byte-pair tokenizer, whose regular expressions recurse."""

_END_TEXTS = (
    "</s>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|end_of_text|>",
)
_POOLINGS = {1: "mean", 3: "last"}
"""What a GGUF file's pooling_type means; 2 is for models that read in both directions."""
_DEFAULT_POOLING = "weighted-mean"
"""The best of the three for models that were not trained to embed: bench/pooling.py measures it."""
_COMPUTE_BUFFER = 64 << 20
_EVAL = "_Bool(*)(void *, int *, int, int, int, int)"

_ffi = _cffi_backend.FFI()


class _Config(ctypes.Structure):
    _fields_ = (
        ("context_length", ctypes.c_int),
        ("gpu_layers", ctypes.c_int),
        ("mmap", ctypes.c_bool),
        ("mlock", ctypes.c_bool),
    )


# -- the library -----------------------------------------------------------------------------------


def _library_path(gpu: bool) -> Path:
    """The variant for this processor. Raises EngineError saying what to install."""
    spec = importlib.util.find_spec("ctransformers")
    if spec is None or spec.origin is None:
        raise EngineError(
            "the package ctransformers is not installed; run: pip install ctransformers==0.2.27"
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
        "pip install --no-binary ctransformers --force-reinstall ctransformers==0.2.27"
    )


def _x86_variants() -> list[str]:
    flags: set[str] = set()
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        flags = set(found[1].split()) if found else set()
    except OSError:
        pass  # no /proc: the variant for every processor is left
    if {"avx2", "fma", "f16c"} <= flags:
        return ["avx2", "avx", "basic"]
    return ["avx", "basic"] if {"avx", "f16c"} <= flags else ["basic"]


class _Library:
    """The C functions, with their types."""

    def __init__(self, gpu: bool) -> None:
        path = _library_path(gpu)
        try:
            lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise EngineError(
                f"ctransformers' library {path.parent.name} cannot be opened: {error}"
            ) from None
        c, p = ctypes, ctypes.c_void_p
        for name, result, arguments in (
            ("create", p, (c.c_char_p, c.c_char_p, _Config)),
            ("delete", None, (p,)),
            ("tokenize", c.c_int, (p, c.c_char_p, c.c_bool, p)),
            ("detokenize", c.c_char_p, (p, c.c_int)),
            ("eos_token_id", c.c_int, (p,)),
            ("bos_token_id", c.c_int, (p,)),
            ("vocab_size", c.c_int, (p,)),
            ("context_length", c.c_int, (p,)),
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
    bos_token_id: Any
    vocab_size: Any
    context_length: Any
    logits_data: Any
    logits_size: Any
    embeddings_data: Any
    embeddings_size: Any


class _Handle:
    """One loaded copy of the model's state: one KV sequence. A lock is held over every call on it."""

    __slots__ = ("address", "lock", "logits", "n_past", "pointer", "state", "tokens")

    def __init__(self, address: int, n_batch: int) -> None:
        self.address = address
        self.pointer = _ffi.cast("void *", address)
        self.lock = threading.Lock()
        self.tokens = _ffi.new("int[]", n_batch)
        self.logits: Any = None
        self.state: Any = None
        """The library's own buffer of the last token's state; None until asked for."""
        self.n_past = 0
        """Positions evaluated; the library itself would take any number."""


# -- the engine --------------------------------------------------------------------------------------


class CTransformersEngine:
    """A model in ctransformers' library, behind the Engine protocol."""

    block = BLOCK

    def __init__(
        self,
        library: _Library,
        config: _Config,
        path: bytes,
        model_type: bytes,
        info: ModelInfo,
        vocabulary: "_Vocabulary",
        n_slots: int,
        n_batch: int,
    ) -> None:
        # what it is
        self.info = info
        self.n_slots = n_slots
        self.n_batch = n_batch
        self.longest_piece = vocabulary.longest
        # the library's
        self._library = library
        self._config = config
        self._path, self._model_type = path, model_type
        self._handles: list[_Handle | None] = [None] * n_slots
        self._vocabulary = vocabulary
        self._tokenizing = threading.Lock()
        self._crew = _Crew(min(available(), n_slots) - 1, self._eval_row)

    def first_handle(self) -> "_Handle":
        """Slot 0's handle: made at load, and the one that tokenizes."""
        return self._handle(0)

    def adopt(self, address: int) -> None:
        """Takes a handle that was made to ask about the model as slot 0's."""
        self._handles[0] = _Handle(address, self.n_batch)

    def _handle(self, slot: int) -> _Handle:
        handle = self._handles[slot]
        if handle is None:
            address = self._library.create(self._path, self._model_type, self._config)
            if not address:
                raise EngineError(
                    f"ctransformers cannot load {os.fsdecode(self._path)}, though its header is sound"
                )
            handle = self._handles[slot] = _Handle(address, self.n_batch)
        return handle

    # -- evaluating --------------------------------------------------------------------------------

    def eval(self, rows: Sequence[Row], threads: int) -> None:
        """Evaluates each row in its slot, several side by side. Raises EngineError."""
        if len(rows) == 1:
            self._eval_row(rows[0], threads)
        else:
            self._crew.work(rows, threads)

    def _eval_row(self, row: Row, threads: int) -> None:
        slot, tokens, n_past, seen = row
        handle = self._handles[slot] or self._handle(slot)
        n = len(tokens)
        if not 1 <= n <= self.n_batch:
            raise EngineError(f"a row has {n} tokens; 1 to {self.n_batch} are allowed")
        if not 0 <= n_past <= handle.n_past or n_past + n > self.info.n_ctx:
            raise EngineError(
                f"position {n_past} with {n} tokens does not follow {handle.n_past} of {self.info.n_ctx}"
            )
        n_vocab, array = self.info.n_vocab, handle.tokens
        for i, token in enumerate(tokens):
            if type(token) is not int or not 0 <= token < n_vocab:
                raise EngineError(f"token {token!r} is not in the vocabulary")
            array[i] = token
        n_call = n if seen is None else 1  # the library keeps the state of a call's last token alone
        with handle.lock:
            handle.n_past = n_past
            for at in range(0, n, n_call):
                if not self._library.batch_eval(
                    handle.pointer, array + at, n_call, n_past + at, n_call, threads
                ):
                    raise EngineError("the library could not evaluate these tokens")
                handle.n_past = n_past + at + n_call
                if seen is not None:
                    seen(self._state(handle))
            if handle.logits is None:
                handle.logits = self._find_logits(handle)

    def _find_logits(self, handle: _Handle) -> Any:
        if self._library.logits_size(handle.address) != self.info.n_vocab:
            raise EngineError("the library has no logits for its vocabulary")
        return _ffi.cast("float *", self._library.logits_data(handle.address))

    def logits(self, slot: int) -> Any:
        """The library's own `float *` of n_vocab logits, valid until the slot's next eval."""
        handle = self._handles[slot]
        if handle is None or handle.logits is None:
            raise EngineError(f"slot {slot} has no logits yet")
        return handle.logits

    def state(self, slot: int) -> Any:
        """The library's own buffer of the last token's n_embd_out float32, valid until the slot's next eval."""
        handle = self._handles[slot]
        if handle is None or not handle.n_past:
            raise EngineError(f"slot {slot} has no state yet")
        return self._state(handle)

    def _state(self, handle: _Handle) -> Any:
        if handle.state is None:
            n = self.n_state(handle)
            if not n or n != self.info.n_embd_out:
                raise EngineError("the library hands out no hidden states of this model")
            address = self._library.embeddings_data(handle.address)
            handle.state = _ffi.buffer(_ffi.cast("float *", address), 4 * n)
        return handle.state

    def n_state(self, handle: _Handle) -> int:
        """Numbers in a state as the library has it after an evaluation; 0 for architectures that keep none."""
        return max(0, int(self._library.embeddings_size(handle.address)))

    # -- text ----------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text. Raises ValueError for text that has no UTF-8 form, or holds NUL."""
        if "\0" in text:
            raise ValueError("the text holds a NUL character, at which the tokenizer would stop")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text holds half of a surrogate pair; send whole characters") from None
        if self.info.first_piece_space:
            ids = self._tokenize(text)
        else:
            ids = [token for part in _parts(text) for token in self._tokenize(part)]
        return self._vocabulary.plain(ids)

    def _tokenize(self, text: str) -> list[int]:
        if not text:
            return []
        raw = text.encode()
        # a token for each byte at most, and three for each space; the library is told no size
        size = 4 * len(raw) + 16
        buffer = (ctypes.c_int * size)()
        handle = self.first_handle()
        with self._tokenizing:
            n = self._library.tokenize(handle.address, raw, False, ctypes.byref(buffer))
        if not 0 <= n <= size:
            os.abort()  # memory beyond the buffer has been written: nothing here can be trusted any more
        return list(buffer[:n])

    def piece(self, token: int) -> bytes:
        """A token's bytes; none for control tokens."""
        return self._vocabulary.pieces[token]

    def close(self) -> None:
        """Gives the handles back. Nothing may be evaluating."""
        self._crew.dismiss()
        for i, handle in enumerate(self._handles):
            if handle is not None:
                with handle.lock:
                    self._library.delete(handle.address)
                self._handles[i] = None


def _parts(text: str) -> list[str]:
    """Text in pieces short enough for the byte-pair tokenizer, cut before spaces where there are any."""
    parts = []
    while len(text) > MAX_BPE_TEXT:
        cut = text.rfind(" ", 1, MAX_BPE_TEXT)
        cut = cut if cut > 0 else MAX_BPE_TEXT
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]


class _Crew:
    """Threads that evaluate rows beside the caller, which takes part itself."""

    def __init__(self, n_helpers: int, work: Any) -> None:
        self._work = work
        self._todo: queue.SimpleQueue[tuple[Row, int] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._help, daemon=True) for _ in range(n_helpers)]
        self._started = False

    def work(self, rows: Sequence[Row], threads: int) -> None:
        """Evaluates all rows; raises the first error once all have ended."""
        if not self._threads:
            for row in rows:
                self._work(row, threads)
            return
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        for row in rows:
            self._todo.put((row, threads))
        n_left, error = len(rows), None
        while True:
            try:
                item = self._todo.get_nowait()
            except queue.Empty:
                break
            if item is not None:
                n_left -= 1
                try:
                    self._work(*item)
                except BaseException as caught:
                    error = error or caught
        n_mine = len(rows) - n_left
        for _ in range(len(rows) - n_mine):
            error = self._done.get() or error
        if error is not None:
            raise error

    def dismiss(self) -> None:
        """Ends the threads."""
        if self._started:
            for _ in self._threads:
                self._todo.put(None)

    def _help(self) -> None:
        while (item := self._todo.get()) is not None:
            try:
                self._work(*item)
            except BaseException as error:
                self._done.put(error)
            else:
                self._done.put(None)


class _Vocabulary:
    """Token ids to bytes, and what plain text may never become."""

    def __init__(self, pieces: list[bytes], control: set[int], byte_tokens: dict[int, int]) -> None:
        self.pieces = pieces
        self.longest = max((len(piece) for piece in pieces), default=1)
        self._control = control
        self._texts: dict[int, bytes] = {}
        self._bytes = byte_tokens

    def forbid(self, token: int, text: bytes) -> None:
        """A control token's text, to be spelled in bytes when a user writes it."""
        self._control.add(token)
        self._texts[token] = text

    def plain(self, ids: list[int]) -> list[int]:
        """The same text without control tokens."""
        if self._control.isdisjoint(ids):
            return ids
        out: list[int] = []
        for token in ids:
            if token in self._control:
                out += [self._bytes[byte] for byte in self._texts.get(token, b"") if byte in self._bytes]
            else:
                out.append(token)
        return out


# -- opening -----------------------------------------------------------------------------------------


def open_model(
    path: str,
    *,
    model_type: str | None,
    name: str,
    n_ctx: int,
    n_slots: int,
    n_batch: int,
    gpu_layers: int,
    pooling: str = "",
) -> CTransformersEngine:
    """Checks a file, loads it and evaluates a token. Raises ModelRefused or EngineError with one sentence."""
    file = Path(path)
    n_slots = min(n_slots, MAX_HANDLES)
    n_batch = max(BLOCK, min(n_batch, MAX_BATCH) // BLOCK * BLOCK)
    try:
        legacy = gguf.kind(file) == "legacy"
        if legacy and not model_type:
            raise ModelRefused(
                f"{file} is a legacy GGML file; say which architecture it has with --model-type"
            )
        header = None if legacy else gguf.read_header(file)
        if header is not None:
            gguf.check(header)
            _check_rows(header)
    except gguf.BadModelFile as error:
        raise ModelRefused(str(error)) from None
    except OSError as error:
        raise ModelRefused(f"{file} cannot be read: {error.strerror or error}") from None
    library = _Library(gpu_layers > 0)
    if header is None:
        engine = _open_legacy(library, file, str(model_type), name, n_ctx, n_slots, n_batch, gpu_layers)
    else:
        engine = _open_gguf(library, header, name, n_ctx, n_slots, n_batch, gpu_layers)
    try:
        _try_out(engine, file)
        _find_states(engine, header, pooling)
    except EngineError:
        engine.close()
        raise
    return engine


def _open_gguf(
    library: _Library, header: gguf.Header, name: str, n_ctx: int, n_slots: int, n_batch: int, gpu_layers: int
) -> CTransformersEngine:
    meta = header.metadata
    n_train = int(header.value("context_length"))
    n_ctx = n_ctx or min(n_train, DEFAULT_CTX)
    _check_memory(header, n_ctx, n_slots)
    tokens: list[bytes] = meta["tokenizer.ggml.tokens"]
    spm = meta["tokenizer.ggml.model"] == "llama"
    types = meta.get("tokenizer.ggml.token_type") or [gguf.NORMAL] * len(tokens)
    byte_tokens: dict[int, int] = {}
    pieces: list[bytes] = []
    special: dict[str, int] = {}
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == gguf.BYTE:
            value = int(token[3:5], 16)
            byte_tokens[value] = i
            pieces.append(bytes([value]))
        elif kind in (gguf.CONTROL, gguf.UNKNOWN, gguf.UNUSED):
            pieces.append(b"")
            if kind == gguf.CONTROL:
                special[token.decode("utf-8", "replace")] = i
        else:
            pieces.append(token.replace(b"\xe2\x96\x81", b" ") if spm else token)
    if not spm:
        byte_tokens = {token[0]: i for i, token in enumerate(tokens) if len(token) == 1}
    eos = int(meta.get("tokenizer.ggml.eos_token_id", 2 if spm else 11))
    bos = int(meta.get("tokenizer.ggml.bos_token_id", 1 if spm else -1))
    if not spm:
        # byte-pair vocabularies mark no control tokens: the end of a text is one by its place
        text = tokens[eos].decode("utf-8", "replace")
        special.setdefault(text, eos)
        pieces[eos] = b""
        bos = -1
    vocabulary = _Vocabulary(pieces, set(), byte_tokens)
    for text, token_id in special.items():
        vocabulary.forbid(token_id, text.encode())
    ends = {eos, *(special[text] for text in _END_TEXTS if text in special)}
    info = ModelInfo(
        name=name,
        architecture=header.architecture,
        quantization=header.quantization,
        n_params=header.n_params,
        n_vocab=len(tokens),
        n_ctx=n_ctx,
        n_ctx_train=n_train,
        n_embd=int(header.value("embedding_length")),
        file_size=header.file_size,
        bos_id=bos,
        eos_id=eos,
        eog_ids=tuple(sorted(ends)),
        special=special,
        chat_template=str(meta.get("tokenizer.chat_template", "")),
        add_bos=bos >= 0,
        engine="ctransformers",
        first_piece_space=spm,
    )
    config = _Config(n_ctx, gpu_layers, True, False)
    path = os.fsencode(header.path)
    return CTransformersEngine(library, config, path, b"gguf", info, vocabulary, n_slots, n_batch)


_LEGACY_FIELDS = {
    # the order of the numbers after the magic, by architecture
    "gpt2": "n_vocab n_ctx n_embd n_head n_layer ftype",
    "gptj": "n_vocab n_ctx n_embd n_head n_layer n_rot ftype",
    "gptneox": "n_vocab n_ctx n_embd n_head n_layer n_rot par_res ftype",
    "dolly-v2": "n_vocab n_ctx n_embd n_head n_layer n_rot par_res ftype",
    "starcoder": "n_vocab n_ctx n_embd n_head n_layer ftype",
}


def _open_legacy(
    library: _Library,
    file: Path,
    model_type: str,
    name: str,
    n_ctx: int,
    n_slots: int,
    n_batch: int,
    gpu_layers: int,
) -> CTransformersEngine:
    size = file.stat().st_size
    known = _legacy_header(file, size, model_type)
    n_train = known.get("n_ctx", 2048)
    n_ctx = min(n_ctx, n_train) if n_ctx else min(n_train, DEFAULT_CTX)
    config = _Config(n_ctx, gpu_layers, True, False)
    path, kind = os.fsencode(file), model_type.encode()
    address = library.create(path, kind, config)
    if not address:
        raise ModelRefused(f"ctransformers cannot load {file} as {model_type}; is that its architecture?")
    n_vocab, eos = library.vocab_size(address), library.eos_token_id(address)
    pieces = [bytes(library.detokenize(address, i)) for i in range(n_vocab)]
    special: dict[str, int] = {}
    if 0 <= eos < n_vocab:
        special[pieces[eos].decode("utf-8", "replace") or "</s>"] = eos
    byte_tokens = {piece[0]: i for i, piece in enumerate(pieces) if len(piece) == 1}
    vocabulary = _Vocabulary(pieces, set(), byte_tokens)
    for text, token in special.items():
        vocabulary.forbid(token, text.encode())
        pieces[token] = b""
    info = ModelInfo(
        name=name,
        architecture=model_type,
        quantization="GGML",
        n_params=0,
        n_vocab=n_vocab,
        n_ctx=n_ctx,
        n_ctx_train=n_train,
        n_embd=known.get("n_embd", 0),
        file_size=size,
        bos_id=-1,
        eos_id=eos if 0 <= eos < n_vocab else -1,
        eog_ids=tuple(special.values()),
        special=special,
        chat_template="",
        add_bos=False,
        engine="ctransformers",
        first_piece_space=False,
    )
    engine = CTransformersEngine(library, config, path, kind, info, vocabulary, n_slots, n_batch)
    engine.adopt(address)
    return engine


def _legacy_header(file: Path, size: int, model_type: str) -> dict[str, int]:
    """The header's numbers where its layout is known. Raises ModelRefused for impossible ones."""
    with file.open("rb") as opened:
        raw = opened.read(64)
    names = _LEGACY_FIELDS.get(model_type, "").split()
    if not names:
        return {}
    if len(raw) < 4 + 4 * len(names):
        raise ModelRefused(f"{file} is cut short: it ends within its header; copy or download it again")
    values = dict(zip(names, struct.unpack_from(f"<{len(names)}i", raw, 4), strict=True))
    most = {
        "n_vocab": size // 4,
        "n_ctx": 1 << 20,
        "n_embd": 1 << 16,
        "n_head": 1024,
        "n_layer": 1024,
        "n_rot": 1024,
    }
    for key, limit in most.items():
        if key in values and not 0 < values[key] <= limit:
            raise ModelRefused(f"{file} is no {model_type} model: its {key} is {values[key]}")
    if values["n_embd"] % values["n_head"]:
        raise ModelRefused(f"{file} is no {model_type} model: its heads do not divide its width")
    n_embd = values["n_embd"]
    # 0 is F32 and 1 F16; thousands count the format's versions
    if values["ftype"] % 1000 > 1 and _odd(n_embd):
        raise _refused_on_arm(str(file), f"quantized rows of {n_embd} values")
    # twelve square matrices a layer, and half a byte a weight at the least
    least = (12 * values["n_layer"] * n_embd + values["n_vocab"]) * n_embd // 2
    if least > size:
        raise ModelRefused(
            f"{file} is cut short or no {model_type} model: its header promises over {least} bytes of weights "
            f"and the file has {size}; copy or download it again"
        )
    return values


def _odd(n: int) -> bool:
    """Whether this machine's library ends its process over quantized rows of n values: on ARM it multiplies blocks
    of 32 values two by two, and asserts that none is left over."""
    return n % 64 != 0 and platform.machine().lower().startswith(("arm", "aarch64"))


def _check_rows(header: gguf.Header) -> None:
    for tensor in header.tensors.values():
        kind, n_block, _ = gguf.TENSOR_TYPES[tensor.type]
        if n_block == 32 and _odd(tensor.shape[0]):
            raise _refused_on_arm(header.path, f"rows of {tensor.shape[0]} values in {kind}")


def _refused_on_arm(path: str, what: str) -> ModelRefused:
    return ModelRefused(
        f"{path} has {what}, and ctransformers runs only multiples of 64 on ARM; take the same model in F16, or one "
        "whose width is such a multiple"
    )


def _check_memory(header: gguf.Header, n_ctx: int, n_slots: int) -> None:
    """Refuses before loading what would not fit, naming the largest context that would."""
    room = memory.available()
    if room is None:
        return
    n_embd, n_head = int(header.value("embedding_length")), int(header.value("attention.head_count"))
    n_kv = int(header.value("attention.head_count_kv", n_head))
    per_token = 2 * int(header.value("block_count")) * n_embd * n_kv // n_head * 2 * n_slots
    fixed = header.file_size + _COMPUTE_BUFFER
    needed = fixed + per_token * n_ctx
    if needed <= room:
        return
    fits = (room - fixed) // per_token // BLOCK * BLOCK
    advice = (
        f"--ctx-size {fits} would fit, or fewer requests at a time with --parallel"
        if fits >= BLOCK
        else "take a smaller or more quantized model"
    )
    raise ModelRefused(
        f"{header.path} needs about {needed / 1e6:.0f} MB with {n_ctx} tokens of context for each of {n_slots} "
        f"requests, and {room / 1e6:.0f} MB are free; {advice}"
    )


def _try_out(engine: CTransformersEngine, file: Path) -> None:
    """One token evaluated and a text tokenized: what does not work now will not later."""
    info = engine.info
    engine.eval([Row(0, [max(info.bos_id, 0)], 0)], 1)
    logits = _ffi.unpack(engine.logits(0), info.n_vocab)
    if not all(map(math.isfinite, logits)) or min(logits) == max(logits):
        raise ModelRefused(f"{file} computes nonsense instead of logits; it is damaged, so download it again")
    text = "Hello \N{GRINNING FACE}"
    said = b"".join(engine.piece(token) for token in engine.tokenize(text)).decode("utf-8", "replace")
    if info.first_piece_space and said.strip() != text:
        raise ModelRefused(f"{file} has a vocabulary that does not spell {text!r} back; it is damaged")


def _find_states(engine: CTransformersEngine, header: gguf.Header | None, pooling: str) -> None:
    """Asks the library whether it keeps this model's hidden states, and chooses how they become an embedding."""
    n = engine.n_state(engine.first_handle())
    if n:
        stated = header.metadata.get(f"{header.architecture}.pooling_type") if header else None
        pooling = pooling or _POOLINGS.get(stated if isinstance(stated, int) else 0, _DEFAULT_POOLING)
        engine.info = structs.replace(engine.info, n_embd_out=n, pooling=pooling)
