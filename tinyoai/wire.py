"""The protocol between the server and a worker process: message types and frames.

A frame is a 4-byte big-endian length, then msgpack of a list of messages. Every message is a tagged struct.

A `Request` is answered in this order: `Started`, then for what needs a slot `Queued` and `Accepted`, each at
most once; then results; each choice of a Generate ends with `ChoiceDone`; and exactly one `Done` or `Failed` ends
the request. `Started` is sent before the first template, tokenizer or other native call for a request.
Content, Vector, Score, Progress and ChoiceDone follow their Accepted. If a worker dies, the server makes the Failed.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from tinyoai import frames
from tinyoai.frames import MAX_FRAME as MAX_FRAME
from tinyoai.frames import WireError as WireError
from tinyoai.prompts import Conversation as Conversation
from tinyoai.prompts import Ids as Ids
from tinyoai.prompts import Markup as Markup
from tinyoai.prompts import Message as Message
from tinyoai.prompts import Prompt as Prompt
from tinyoai.prompts import Segment as Segment
from tinyoai.prompts import Special as Special
from tinyoai.prompts import Text as Text
from tinyoai.sampling import Sampling

# -- server to worker ------------------------------------------------------------------------------


class Adapter(msgspec.Struct, frozen=True, array_like=True):
    """A LoRA adapter as a request uses it: its name or its place in the load, and the factor of its changes."""

    name: str | int
    scale: float = 1.0


MAX_ADAPTER_SCALE = 100.0
"""A larger factor, on either side of 0, makes nonsense of a model."""


class AdapterFile(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter of a load. `scale` counts in requests that name no adapters."""

    name: str
    path: str
    scale: float = 1.0
    size: int = 0
    """Bytes of the file."""


class Load(msgspec.Struct, frozen=True, tag="load", kw_only=True):
    """The first message to a worker: the model to load. Answered by Ready or LoadFailed."""

    path: str
    name: str
    engine: str
    model_type: str | None = None
    n_ctx: int = 0
    """Tokens of one sequence, at most; 0: the engine chooses."""
    n_slots: int = 4
    n_cells: int = 0
    """KV cells of all slots together; 0: n_ctx for each slot."""
    kv: str = "unified"
    """unified: all slots share the cells; separate: each slot has its part of them; auto: the engine chooses."""
    reproducible: bool = False
    """Equal requests with temperature 0 or a seed get equal answers, in any company."""
    state_dir: str = ""
    """The folder for results of self-tests; empty: none are kept."""
    n_batch: int = 32
    """Prompt tokens of one request evaluated in one step, at most."""
    n_threads: int = 0
    """0: measured at load."""
    n_queue: int = 32
    """Requests that may wait for a slot."""
    queue_timeout_s: float = 300.0
    """Seconds a request may wait for a slot."""
    n_gpu_layers: int = 0
    pooling: str = ""
    """The way token states become an embedding; empty: the file's own, else the engine's choice."""
    template: str = "auto"
    """The chat template of conversations that name none."""
    template_source: str = ""
    """A Jinja template that takes the place of the model's own; empty: none."""
    cache_type_k: str = "f16"
    """The tensor type of keys in the KV cache."""
    cache_type_v: str = "f16"
    """The tensor type of values in the KV cache."""
    flash_attn: str = "auto"
    """auto, on or off."""
    mmap: bool = True
    """Map the file, so that its pages are shared and can be dropped; else read it into memory."""
    mlock: bool = False
    """Keep the weights in RAM."""
    cache_ram: int = 0
    """Bytes of host memory for the states of finished sequences."""
    cache_disk: int = 0
    """Bytes on disk for the states of finished sequences."""
    cache_dir: str = ""
    """The folder of states on disk; empty: none are kept there."""
    adapters: tuple[AdapterFile, ...] = ()


class Generate(msgspec.Struct, frozen=True, tag="generate", kw_only=True, omit_defaults=True):
    """Generate one or more choices for one prompt."""

    prompt: Prompt
    sampling: Sampling
    n: int = 1
    """Choices. Choice i draws from `sampling.seed` + i."""
    max_tokens: int | None = None
    """For each choice; None: until the model ends or the context is full."""
    min_tokens: int = 0
    stop: list[str] = []
    ignore_eos: bool = False
    logprobs: int = -1
    """-1: none; 0: of the chosen token; N: of the N likeliest too."""
    score_end: bool = False
    """With log-probabilities: include the token that ends the answer, which has no text."""
    echo: bool = False
    """The prompt comes back as the first Content, with its log-probabilities if they are wanted."""
    exact: bool = False
    """Equal requests must get equal answers: reuse only what equals a fresh prefill bit for bit."""
    adapters: tuple[Adapter, ...] | None = None
    """LoRA adapters; None: those of the load, with their scales."""
    param: str = "messages"
    """The request field that a refusal of the prompt names."""


class Embed(msgspec.Struct, frozen=True, tag="embed", kw_only=True, omit_defaults=True):
    """Embed one text: a prefill that returns one Vector."""

    prompt: Prompt
    dimensions: int = 0
    """Keep this many numbers, scaled to length 1 again; 0: all."""
    param: str = "input"


class Rank(msgspec.Struct, frozen=True, tag="rank", kw_only=True, omit_defaults=True):
    """Score how well a document answers a query: a prefill of both that returns one Score."""

    query: str
    document: str
    param: str = "documents"


class Tokenize(msgspec.Struct, frozen=True, tag="tokenize", kw_only=True, omit_defaults=True):
    """Return the ids of a prompt as one Tokens. Needs no slot and never queues."""

    prompt: Prompt
    pieces: bool = False
    """Return each token's bytes too."""
    text: bool = False
    """Return the prompt as text too."""
    param: str = "content"


class Detokenize(msgspec.Struct, frozen=True, tag="detokenize", kw_only=True, omit_defaults=True):
    """Return the text of ids as one PlainText. Needs no slot and never queues."""

    ids: list[int]
    param: str = "tokens"


NeedsSlot = Generate | Embed | Rank
"""Bodies that wait for a slot."""
Body = Generate | Embed | Rank | Tokenize | Detokenize


class Request(msgspec.Struct, frozen=True, tag="request", kw_only=True, omit_defaults=True):
    """A body with its id, which is unique in the worker's life, and its place in the queue."""

    id: int
    body: Body
    client: str = ""
    """The queue is fair across clients."""
    scope: str = ""
    """Prefixes are reused between requests of the same scope only."""
    group: str = ""
    """The HTTP request that this is a part of; empty: a group of its own."""
    deadline: float | None = None
    """CLOCK_MONOTONIC seconds, which both processes share. In the queue the request then fails with
    `queue_timeout`; a running answer ends with finish_reason "length"."""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """End a request. Answered by its own Failed or Done, whichever comes first."""

    id: int


class Threads(msgspec.Struct, frozen=True, tag="threads"):
    """Use at most n threads for each of the next steps: other workers share the cores. Has no answer."""

    n: int


SAVE_S = 5.0
"""Seconds that a worker may take to save before it exits."""


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Save finished sequences within SAVE_S, where they are kept on disk, and exit. A closed socket: exit now."""


ToWorker = Load | Request | Cancel | Threads | Shutdown


# -- worker to server ------------------------------------------------------------------------------


FinishReason = Literal["stop", "length"]


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of a loaded model. Lengths are in tokens, sizes in bytes; ids are -1 for none."""

    name: str
    architecture: str
    quantization: str
    engine: str
    engine_version: str = ""
    n_params: int
    n_vocab: int
    n_ctx: int
    n_ctx_train: int
    n_embd: int
    file_size: int
    bos_id: int
    eos_id: int
    eog_ids: tuple[int, ...]
    """Every id that ends generation."""
    special: dict[str, int]
    """Control tokens by their text."""
    chat_template: str
    add_bos: bool
    """A prompt begins with the token bos_id."""
    add_eos: bool = False
    """A text to embed ends with the token eos_id."""
    add_space_prefix: bool
    """The tokenizer puts a space before every text, and an answer's first piece may begin with it."""
    n_embd_out: int = 0
    """Numbers in an embedding; 0: the model cannot embed."""
    pooling: str = ""
    """The way token states become an embedding: mean, weighted-mean, last or cls."""
    adapters: tuple[Adapter, ...] = ()
    """All LoRA adapters in the order of the load, with the scales that count where a request names none."""

    def token_text(self, token: int) -> str:
        """The text of a control token; empty for any other id."""
        return next((text for text, known in self.special.items() if known == token), "")


class Ready(msgspec.Struct, frozen=True, tag="ready", kw_only=True):
    """The model is loaded and warmed up."""

    info: ModelInfo
    n_slots: int
    n_cells: int = 0
    """KV cells that the slots share; 0: each has its context window for itself."""
    n_threads: int
    version: str
    """Engine and sampler version, for `system_fingerprint`."""
    template: str = ""
    """The chat template that "auto" means."""
    max_step_s: float = 0.0
    """The longest step to expect, in seconds: the stall limit follows it."""
    resident_bytes: int = 0
    """The worker's resident memory after the load; 0: not measured."""
    reproducible: bool = False
    """Equal requests with temperature 0 or a seed get equal answers, in any company."""


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed", kw_only=True):
    """The model cannot be served; the message is one sentence for the user."""

    message: str


class Started(msgspec.Struct, frozen=True, tag="started"):
    """Work on the request begins. From here on it is never sent to another worker."""

    id: int


class Queued(msgspec.Struct, frozen=True, tag="queued"):
    """The prompt is valid and the request waits for a slot."""

    id: int
    n_prompt: int


class Accepted(msgspec.Struct, frozen=True, tag="accepted", kw_only=True):
    """The request has a slot."""

    id: int
    n_prompt: int
    n_cached: int
    """Prompt tokens that were already in the KV cache."""
    cache_miss: int = -1
    """The prompt token at which the best cached sequence differs; -1: no cached one shares a token with the prompt."""
    queue_ms: float = 0.0


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Prompt tokens evaluated so far, cached ones included."""

    id: int
    n_done: int


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One token's bytes, natural log-probability (None: nothing precedes it), and the likeliest in its place."""

    piece: bytes
    logprob: float | None
    top: list[tuple[bytes, float]] = []


class Content(msgspec.Struct, frozen=True, tag="c", kw_only=True, omit_defaults=True):
    """Text of a choice that is safe to send: whole code points, no part of a possible stop sequence."""

    id: int
    text: str
    choice: int = 0
    logprobs: list[TokenLogprob] = []


class Vector(msgspec.Struct, frozen=True, tag="vector", kw_only=True):
    """An embedding of length 1, as little-endian float32 values."""

    id: int
    values: bytes


class Score(msgspec.Struct, frozen=True, tag="score", kw_only=True):
    """The result of a Rank, as the model gives it: larger is better."""

    id: int
    value: float


class Tokens(msgspec.Struct, frozen=True, tag="tokens", kw_only=True):
    """The result of a Tokenize. Control tokens have their texts in `pieces` and `text`."""

    id: int
    ids: list[int]
    pieces: list[bytes] = []
    text: str = ""


class PlainText(msgspec.Struct, frozen=True, tag="text", kw_only=True):
    """The result of a Detokenize."""

    id: int
    text: str


class ChoiceDone(msgspec.Struct, frozen=True, tag="choice_done", kw_only=True):
    """A choice is complete. Times are in milliseconds; `prompt_ms` is of the prefill alone."""

    id: int
    choice: int
    finish_reason: FinishReason
    n_cached: int
    cache_miss: int = -1
    """As in Accepted, of this choice."""
    n_generated: int
    prompt_ms: float
    predicted_ms: float


class Done(msgspec.Struct, frozen=True, tag="done", kw_only=True, omit_defaults=True):
    """The request is complete."""

    id: int
    n_prompt: int = 0
    n_cached: int = 0
    queue_ms: float = 0.0


class Failed(msgspec.Struct, frozen=True, tag="failed", kw_only=True):
    """The request ends in an error; `kind` names a class of the exception tree in `errors`."""

    id: int
    kind: str
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: float | None = None


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """The worker's loop runs; sent after a second without another message."""

    max_step_s: float = 0.0
    """As in Ready, but measured since."""


Result = Content | Vector | Score | Tokens | PlainText
Success = Started | Queued | Accepted | Progress | Result | ChoiceDone | Done
Event = Success | Failed
Final = Done | Failed
"""Ends a request."""
AfterAccepted = Progress | Content | Vector | Score | ChoiceDone
"""Only valid once the request was accepted."""

ToServer = Ready | LoadFailed | Success | Failed | Heartbeat


_encoder = msgspec.msgpack.Encoder()


def frame(messages: Sequence[ToWorker] | Sequence[ToServer]) -> bytes:
    """One frame of these messages. Raises WireError over MAX_FRAME."""
    return frames.pack(_encoder.encode(messages))


class WorkerReader(frames.Reader[ToWorker]):
    """Reads the server's messages."""

    def __init__(self) -> None:
        super().__init__(msgspec.msgpack.Decoder(list[ToWorker]))


class ServerReader(frames.Reader[ToServer]):
    """Reads a worker's messages."""

    def __init__(self) -> None:
        super().__init__(msgspec.msgpack.Decoder(list[ToServer]))
