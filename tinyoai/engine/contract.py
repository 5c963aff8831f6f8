"""The engine contract: rows, capabilities and the calls that the scheduler may make.

An engine holds one model and `n_seq` KV sequences. The scheduler sends rows of distinct sequences in one `eval`,
then reads logits or embeddings of those rows before the next `eval`. The capabilities of an engine
say what it can do, and the scheduler uses nothing else. One thread calls everything but `encode` and `piece`, which
are safe beside a running `eval`.
"""

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from tinyoai.wire import Adapter, ModelInfo, Segment

__all__ = [
    "Adapter",
    "Capabilities",
    "Copies",
    "Engine",
    "EngineError",
    "Interrupted",
    "ModelInfo",
    "ModelRefused",
    "NoRoom",
    "PairForm",
    "Partial",
    "Row",
    "Truncates",
    "Want",
]


class EngineError(Exception):
    """A call to the engine failed; the message is one clear sentence for the user."""


class ModelRefused(EngineError):
    """The model cannot be served as it is; trying again does not help."""


class NoRoom(Exception):
    """The KV cache has no cells for these rows. Nothing changed."""


class Interrupted(Exception):
    """The evaluation was interrupted, or its time was up. Nothing changed."""


class Partial(Exception):
    """An evaluation stopped early. `done` counts the tokens of each row that are in its sequence now."""

    def __init__(self, done: Sequence[int], cause: str) -> None:
        super().__init__(cause)
        self.done = list(done)


class Want(enum.Enum):
    """The outputs of a row."""

    NOTHING = 0
    LAST = 1
    """Logits of the last token."""
    ALL = 2
    """Logits of every token."""
    EMBEDDING = 3
    """With `pools` the embedding of the whole text; else the hidden state of every token."""
    SCORE = 4
    """The score of the sequence up to the last token."""


class Row(NamedTuple):
    """Tokens to append to a sequence. `pos` must be the sequence's length."""

    seq: int
    tokens: Sequence[int]
    pos: int
    want: Want = Want.LAST
    adapters: tuple[Adapter, ...] = ()
    """LoRA adapters; all rows of one eval have the same."""


class Copies(enum.Enum):
    """The part of a sequence that `copy` can copy to another."""

    NONE = 0
    WHOLE = 1
    PREFIX = 2


class Truncates(enum.Enum):
    """The suffixes that `truncate` can drop."""

    FREELY = 0
    CHECKPOINTS = 1
    """It may keep fewer tokens than asked for."""
    NEVER = 2
    """It keeps everything or nothing."""


class PairForm(msgspec.Struct, frozen=True):
    """The prompt of a query and a document, for a model that ranks."""

    template: str = ""
    """With {query} and {document} in it; empty: ids around the texts."""
    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and abilities of a loaded model."""

    n_seq: int
    """KV sequences, which are the slots."""
    n_ctx: int
    """Tokens of one sequence, at most."""
    n_batch: int
    """Tokens of one eval, all rows together."""
    n_row: int
    """Tokens of one row, at most."""
    n_kv: int
    """KV cells of all sequences together."""
    n_outputs: int
    """Tokens of one row that can have logits or hidden states."""
    n_outputs_total: int = 1 << 30
    """Tokens of one eval that can have logits or hidden states, all rows together."""
    n_chunk: int = 0
    """Prompt tokens of a step beside decoding rows, at most; 0: n_row."""
    align: int = 1
    """Rows of a prefill that end at multiples of this give results that do not depend on where it is cut."""
    n_least: int = 1
    """Prompt tokens of a step, at least, unless its prompt ends; fewer would change results."""
    bit_exact: bool = True
    """A row's result does not depend on its neighbours, nor on cuts at multiples of `align`."""
    copies: Copies = Copies.NONE
    shares_cells: bool = False
    """All sequences take cells from one pool, and a copy has those of its source."""
    truncates: Truncates = Truncates.FREELY
    saves: bool = False
    cuts_saved: bool = True
    """A loaded state can be truncated. False: it lacks what lies before a sliding window."""
    interrupts: bool = False
    """An eval can end early, see `interrupt`."""
    whole_rows: bool = False
    """A text must be evaluated in one row."""
    generates: bool = True
    """False: it makes embeddings only, as an encoder does; it has no logits to choose a token from."""
    pools: bool = False
    """The engine makes a text's embedding itself."""
    pair: PairForm | None = None
    """The model scores how well a document answers a query, given in this form; None: it does not."""
    vision: bool = False
    adapters: bool = False
    longest_piece: int = 1
    """Bytes of the longest token."""
    step_cost: dict[int, float] = {}
    """Milliseconds of a decode step by its number of rows, as far as they are measured."""
    batches: bool = False
    """Rows of one step share work; else each costs the same in any company."""

    @property
    def cuts_states(self) -> bool:
        """A loaded state serves for every prefix of its tokens, not only as a whole."""
        return self.cuts_saved and self.truncates is not Truncates.NEVER


class Engine(Protocol):
    """One loaded model."""

    info: ModelInfo
    caps: Capabilities
    state_format: str
    """Names the library and the form of its saved states, which no other version need understand."""
    n_threads: int
    """Threads of a step with one row."""

    def encode(self, prompt: Sequence[Segment]) -> list[int]:
        """Ids of a prompt. No Text can become a control token. Raises ValueError in words for the client."""

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token; for control tokens none, or with `special` their text."""

    def limit_threads(self, n: int) -> None:
        """From the next eval on, at most n threads are used; n is at least 1. A large n lifts the limit."""

    def eval(self, rows: Sequence[Row], until: float = 0.0) -> None:
        """Evaluates rows of distinct sequences. Raises NoRoom, Partial, Interrupted or EngineError.

        With `interrupts` it ends at the time `until`, in seconds of CLOCK_MONOTONIC; 0: no limit.
        """

    def interrupt(self) -> None:
        """Ends the eval that runs in another thread, soon, with Interrupted; without `interrupts` nothing happens."""

    def logits(self, row: int, at: int = -1) -> Any:
        """Logits of token `at` of row number `row` of the last eval: a cffi `float *` or buffer of n_vocab float32.

        Valid until the next eval.
        """

    def embedding(self, row: int) -> Any:
        """A buffer of float32: n_embd_out for the row's text (`pools`), else n_embd_out for each of its tokens.

        Valid until the next eval.
        """

    def score(self, row: int) -> float:
        """The score of row number `row` of the last eval."""

    def truncate(self, seq: int, n: int) -> int:
        """Drops all but the first n tokens of a sequence; returns how many are kept: n, fewer, or 0."""

    def exact_prefix(self, seq: int, n: int, n_prompt: int) -> int:
        """Returns how many of the first n tokens of `seq` equal a fresh prefill of n_prompt tokens bit for bit."""

    def copy(self, src: int, dst: int, n: int) -> None:
        """Replaces `dst` by the first n tokens of `src`; with Copies.WHOLE n is the length of `src`."""

    def save(self, seq: int) -> bytes:
        """The state of a sequence, for `load` on the same model, engine version and settings."""

    def load(self, seq: int, state: bytes) -> bool:
        """Replaces a sequence by a saved state; False, and an empty sequence, if the state does not fit."""

    def close(self) -> None:
        """Frees everything. Nothing may be evaluating."""
