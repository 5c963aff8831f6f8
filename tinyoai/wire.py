"""What the server and a worker say to each other, and how it is framed.

Owns the message types and the frame: a 4-byte big-endian length, then msgpack of a list of
messages (all that one side has to say at that moment). It must not know sockets, processes,
OpenAI's words or any engine.

The law: every Generate is answered by at most one Accepted, then any number of Delta, and exactly
one of Done and Failed; an Embed the same with one Vector in the Deltas' place; a Tokenize by exactly
one of Tokens and Failed, a Detokenize by one of Plain and Failed. Delta, Vector and Done only follow
their Accepted. Where a worker dies, the server's handle makes the Failed itself.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

MAX_FRAME = 64 << 20
"""Bytes. A longer frame can only be a broken peer."""

_LENGTH = struct.Struct(">I")


class WireError(Exception):
    """The byte stream is not a sequence of frames of the expected messages."""


# -- a prompt: what is control and what is text is decided by structure, never by content ---------


class Text(msgspec.Struct, frozen=True, tag="t", array_like=True):
    """Plain text: it can never become a control token."""

    text: str


class Special(msgspec.Struct, frozen=True, tag="s", array_like=True):
    """A control token by its text in the vocabulary, or the pseudo names "bos" and "eos"."""

    name: str


class Ids(msgspec.Struct, frozen=True, tag="i", array_like=True):
    """Token ids as the client gave them."""

    ids: list[int]


Segment = Text | Special | Ids


# -- server to worker ------------------------------------------------------------------------------


class Load(msgspec.Struct, frozen=True, tag="load", kw_only=True):
    """The first message to a worker: what to load. Answered by Ready or LoadFailed."""

    path: str
    name: str
    engine: str
    model_type: str | None = None
    n_ctx: int = 0
    """0: the engine's own choice from the model's context window."""
    n_slots: int = 4
    n_batch: int = 32
    n_threads: int = 0
    """0: measured at load."""
    n_queue: int = 32
    """Requests that may stand in the line before the slots."""
    wait_s: float = 300.0
    """Seconds that they may stand there, unless they say it themselves."""
    n_gpu_layers: int = 0
    pooling: str = ""
    """How token states become an embedding, "mean" or "last"; empty: what the file says, else the engine's choice."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen; see csrc/api.h for the exact meaning of each number."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0


class Generate(msgspec.Struct, frozen=True, tag="generate", kw_only=True):
    """One answer wanted. `id` is the server's, unique in the worker's life."""

    id: int
    prompt: list[Segment]
    sampling: Sampling
    max_tokens: int | None = None
    """None: until the model ends or the context is full."""
    min_tokens: int = 0
    stop: list[str] = []
    ignore_eos: bool = False
    logprobs: int = -1
    """-1: none; 0: of the chosen token; N: of the N likeliest too."""
    score_end: bool = False
    """With log-probabilities: the token that ends the answer has its own, too, and no text."""
    echo: bool = False
    """The prompt comes back as the first Delta, with its log-probabilities where they are asked for."""
    exact: bool = False
    """Equal requests must get equal answers: only what a fresh prefill would give is reused."""
    strip_space: bool = False
    """An answer after a chat prompt: one leading space that the tokenizer put there is taken off."""
    param: str = "messages"
    """The request's field that a refusal of the prompt is about."""
    client: str = ""
    """Who asks: the line before the slots takes turns between clients."""
    group: str = ""
    """The HTTP request that this is a part of; empty: it is one by itself."""
    wait_s: float | None = None
    """Seconds it may stand in the line; None: as Load says."""
    deadline_s: float | None = None
    """Seconds from now after which what there is must be the answer (finish_reason "length")."""


class Embed(msgspec.Struct, frozen=True, tag="embed", kw_only=True):
    """The embedding of one text wanted: a prefill of which only a vector comes back."""

    id: int
    prompt: list[Segment]
    dimensions: int = 0
    """Keep so many numbers, at a length of 1 again; 0: all."""
    param: str = "input"
    """The request's field that a refusal of the prompt is about."""
    client: str = ""
    group: str = ""
    wait_s: float | None = None
    """These three as in Generate."""


class Tokenize(msgspec.Struct, frozen=True, tag="tokenize", kw_only=True):
    """The ids of a prompt wanted; needs no slot and never waits in the line."""

    id: int
    prompt: list[Segment]
    pieces: bool = False
    """Each token's bytes are wanted too."""
    text: bool = False
    """The prompt written out is wanted too."""
    param: str = "content"


class Detokenize(msgspec.Struct, frozen=True, tag="detokenize", kw_only=True):
    """The text of ids wanted; needs no slot and never waits in the line."""

    id: int
    ids: list[int]
    param: str = "tokens"


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Answered by the call's own Failed or Done, whichever comes first."""

    id: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Leave now; a closed socket says the same."""


Ask = Generate | Embed | Tokenize | Detokenize
"""What has an id and is answered."""

ToWorker = Load | Generate | Embed | Tokenize | Detokenize | Cancel | Shutdown


FinishReason = Literal["stop", "length"]


# -- worker to server ------------------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, tag="ready", kw_only=True):
    """The model is loaded and warmed up. Sizes are in bytes, lengths in tokens."""

    name: str
    architecture: str
    quantization: str
    engine: str
    n_params: int
    n_vocab: int
    n_ctx: int
    n_ctx_train: int
    n_embd: int
    n_slots: int
    n_batch: int
    n_threads: int
    file_size: int
    special: list[str]
    chat_template: str
    version: str
    """Engine and sampler version: what the fingerprint of an answer is made of."""
    n_embd_out: int = 0
    """Numbers in an embedding; 0: this model has none to give."""
    pooling: str = ""
    """How token states become an embedding: "mean" or "last"."""
    bos: str = ""
    eos: str = ""
    """The control tokens that begin and end a text, as they are written; empty for none."""


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed", kw_only=True):
    """The model cannot be served; the message is one sentence for the user."""

    message: str


class Accepted(msgspec.Struct, frozen=True, tag="accepted", kw_only=True):
    """The request has a slot; nothing can refuse it any more."""

    id: int
    n_prompt: int
    n_cached: int
    queue_ms: float = 0.0
    """Milliseconds it stood in the line."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One token's bytes, natural log-probability (None: nothing precedes it), the likeliest instead."""

    piece: bytes
    logprob: float | None
    top: list[tuple[bytes, float]] = []


class Delta(msgspec.Struct, frozen=True, tag="delta", kw_only=True, omit_defaults=True):
    """Text that is certain: whole code points, no part of a possible stop sequence."""

    id: int
    text: str
    logprobs: list[TokenLogprob] = []


class Vector(msgspec.Struct, frozen=True, tag="vector", kw_only=True):
    """An embedding of length 1: little-endian float32, one after the other."""

    id: int
    values: bytes


class Tokens(msgspec.Struct, frozen=True, tag="tokens", kw_only=True):
    """The whole answer to a Tokenize. Control tokens have their texts in `pieces` and `text`."""

    id: int
    ids: list[int]
    pieces: list[bytes] = []
    text: str = ""


class Plain(msgspec.Struct, frozen=True, tag="plain", kw_only=True):
    """The whole answer to a Detokenize."""

    id: int
    text: str


class Done(msgspec.Struct, frozen=True, tag="done", kw_only=True):
    """The end of a good answer. Times are in milliseconds; prompt_ms is of the prefill alone."""

    id: int
    finish_reason: FinishReason
    n_prompt: int
    n_cached: int
    n_generated: int
    prompt_ms: float
    predicted_ms: float
    queue_ms: float = 0.0
    """As in its Accepted."""


class Failed(msgspec.Struct, frozen=True, tag="failed", kw_only=True):
    """The end of a bad one: `kind` names a class of the exception tree in `errors`."""

    id: int
    kind: str
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: float | None = None


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """The worker's loop goes round; sent when nothing else was for a while."""


Good = Accepted | Delta | Vector | Tokens | Plain | Done
Event = Good | Failed
Last = Tokens | Plain | Done | Failed
"""What ends a call."""

ToServer = Ready | LoadFailed | Good | Failed | Beat


_encoder = msgspec.msgpack.Encoder()


def frame(messages: Sequence[ToWorker] | Sequence[ToServer]) -> bytes:
    """One frame of these messages. Raises WireError over MAX_FRAME."""
    body = _encoder.encode(messages)
    if len(body) > MAX_FRAME:
        raise WireError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


class _Unframer:
    """Bytes in, whole frame bodies out, however the bytes were cut."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def bodies(self, data: bytes) -> Iterable[bytes]:
        if not self._buffer and len(data) > _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data)
            if length == len(data) - _LENGTH.size <= MAX_FRAME:  # almost always: one frame, whole
                yield data[_LENGTH.size :]
                return
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise WireError(f"a frame claims {length} bytes; the limit is {MAX_FRAME}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield body


class WorkerReader:
    """Reads what the server says. `feed` raises WireError on anything that is no such message."""

    def __init__(self) -> None:
        self._frames = _Unframer()
        self._decoder = msgspec.msgpack.Decoder(list[ToWorker])

    def feed(self, data: bytes) -> list[ToWorker]:
        """The messages that these bytes complete, in order."""
        try:
            return [m for body in self._frames.bodies(data) for m in self._decoder.decode(body)]
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise WireError(f"not a message to a worker: {error}") from error


class ServerReader:
    """Reads what a worker says. `feed` raises WireError on anything that is no such message."""

    def __init__(self) -> None:
        self._frames = _Unframer()
        self._decoder = msgspec.msgpack.Decoder(list[ToServer])

    def feed(self, data: bytes) -> list[ToServer]:
        """The messages that these bytes complete, in order."""
        try:
            return [m for body in self._frames.bodies(data) for m in self._decoder.decode(body)]
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise WireError(f"not a message to the server: {error}") from error
