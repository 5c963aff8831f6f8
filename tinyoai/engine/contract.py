"""The Engine protocol: what the scheduler may ask of whatever evaluates a model.

Owns the protocol's types and its errors. It must not know any engine, nor HTTP or the wire.
An engine keeps one KV cache sequence for each slot; it evaluates rows and hands out logits.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec


class EngineError(Exception):
    """The engine cannot do it; the message is one clear sentence for the user."""


class ModelRefused(EngineError):
    """The model cannot be served as it is: trying again does not help."""


class Row(NamedTuple):
    """Tokens to evaluate in a slot at positions n_past and on; 1 to n_batch of them."""

    slot: int
    tokens: Sequence[int]
    n_past: int
    seen: Callable[[Any], None] | None = None
    """Called with each token's state, a buffer of n_embd_out float32 valid for the call. Then the tokens are
    evaluated one by one, and this may be called in any thread."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded model is. Lengths are in tokens, sizes in bytes; bos_id and eos_id are -1 for none."""

    name: str
    architecture: str
    quantization: str
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
    engine: str
    first_piece_space: bool
    """The tokenizer puts a space before every text, and an answer's first piece may begin with it."""
    n_embd_out: int = 0
    """Numbers in a token's state; 0: the engine does not hand this model's states out."""
    pooling: str = ""
    """How states become an embedding: see `pooling`."""


class Engine(Protocol):
    """One loaded model with its slots."""

    info: ModelInfo
    n_slots: int
    n_batch: int
    block: int
    """Positions that attention is summed over at once: see `slots`. n_batch is a multiple of it."""
    longest_piece: int
    """Bytes of the longest token."""

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text, never control tokens; safe to call beside eval. Raises ValueError."""

    def piece(self, token: int) -> bytes:
        """The bytes of a token; none for control tokens."""

    def eval(self, rows: Sequence[Row], threads: int) -> None:
        """One step over rows of distinct slots. Raises EngineError."""

    def logits(self, slot: int) -> Any:
        """A cdata `float *` (or a buffer) of n_vocab floats, valid until the slot's next eval."""

    def state(self, slot: int) -> Any:
        """A buffer of n_embd_out float32: the last token's final hidden state, valid until the slot's next eval."""

    def close(self) -> None:
        """Gives everything back."""
