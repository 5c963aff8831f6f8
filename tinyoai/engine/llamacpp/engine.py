"""A model in libllama, behind the engine contract.

All rows of a step go to the library in one batch. Rows that want hidden states or scores go first, in a batch of
their own: there every token has an output.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinyoai.engine.contract import (
    Adapter,
    Capabilities,
    Copies,
    EngineError,
    Interrupted,
    NoRoom,
    Row,
    Truncates,
    Want,
)
from tinyoai.engine.llamacpp.context import Context
from tinyoai.engine.llamacpp.library import Library
from tinyoai.engine.llamacpp.vocabulary import Vocabulary
from tinyoai.engine.threads import ThreadChoice
from tinyoai.wire import ModelInfo, Segment

_POOLED = (Want.EMBEDDING, Want.SCORE)
"""Outputs that come of hidden states."""


class LlamaCppEngine:
    """One loaded model."""

    def __init__(
        self,
        library: Library,
        context: Context,
        vocabulary: Vocabulary,
        info: ModelInfo,
        caps: Capabilities,
        *,
        free_model: Callable[[], None],
        adapters: Mapping[str, Any] | None = None,
    ) -> None:
        """`adapters` are `llama_adapter_lora *` by name."""
        self.info = info
        self.caps = caps
        self.state_format = library.identity
        self.n_threads = 1
        self._threads: ThreadChoice | None = None
        """Chooses the threads of each step; None: n_threads, or as many as are allowed."""
        self._allowed = 1 << 30
        """Threads of a step, at most."""
        self._ffi = library.ffi
        self._context = context
        self._vocabulary = vocabulary
        vocabulary.info = info
        self._free_model = free_model
        self._adapters = adapters or {}
        self._applied: tuple[Adapter, ...] = ()
        """The adapters that the context applies now."""
        self._n_past = [0] * caps.n_seq
        self._places: list[int] = []
        """For each row of the last eval with logits, the place of its first token in the batch."""
        self._states: dict[int, Any] = {}
        """Copies of the hidden states of rows of the last eval."""
        self._scores: dict[int, float] = {}
        """The scores of rows of the last eval."""
        self._rows: Sequence[Row] = ()
        """The rows of the last eval, whose outputs may be read."""

    def use_threads(self, n: int, choice: ThreadChoice | None = None) -> None:
        """Sets the number of threads; with a `choice` a step may have fewer."""
        self.n_threads, self._threads = n, choice

    def limit_threads(self, n: int) -> None:
        """From the next eval on, at most n threads are used."""
        self._allowed = n
        if self._threads is not None:
            self._threads.allow(n)

    # -- evaluating --------------------------------------------------------------------------------

    def eval(self, rows: Sequence[Row], until: float = 0.0) -> None:
        """Evaluates rows of distinct sequences. Raises NoRoom, Interrupted or EngineError.

        After a failure each sequence has the length that it had, or none where the model cannot go back.
        """
        self._rows = ()
        self._check(rows)
        if not self.caps.interrupts:
            until = 0.0
        states = [i for i, row in enumerate(rows) if row.want in _POOLED]
        rest = [row for row in rows if row.want not in _POOLED] if states else rows
        self._states.clear()
        self._scores.clear()
        if rows[0].adapters != self._applied:
            self._apply(rows[0].adapters)
        try:
            if states:
                self._eval_states(rows, states, until)
            if rest:
                self._decode(rest, until, embed=False)
        except (NoRoom, Interrupted, EngineError) as error:
            for row in rows:
                # without room nothing was computed, and a model that cannot go back need not
                if not isinstance(error, NoRoom) or self._context.length(row.seq) != row.pos:
                    self._cut(row.seq, row.pos)
            raise
        places, at = [], 0
        for row in rows:
            n = len(row.tokens)
            places.append(at)
            at += n if row.want not in _POOLED else 0
            self._n_past[row.seq] = row.pos + n
            if self.caps.whole_rows:
                self._cut(row.seq, 0)  # its states are copied, and cells are few
        self._places, self._rows = places, rows

    def _apply(self, adapters: tuple[Adapter, ...]) -> None:
        """Makes the context apply these adapters and no others. Raises EngineError."""
        for adapter in adapters:
            if adapter.name not in self._adapters or not math.isfinite(adapter.scale):
                raise EngineError(f"there is no LoRA adapter {adapter.name!r} with the scale {adapter.scale}")
        self._context.use_adapters(
            [self._adapters[str(adapter.name)] for adapter in adapters],
            [adapter.scale for adapter in adapters],
        )
        self._applied = adapters

    def _decode(self, rows: Sequence[Row], until: float, *, embed: bool) -> None:
        choice, context = self._threads, self._context
        if choice is None:
            context.decode(rows, min(self.n_threads, self._allowed), until, embed=embed)
            return
        n_tokens, begin = sum(len(row.tokens) for row in rows), time.monotonic()
        limit = begin + choice.limit_s(n_tokens) if self.caps.interrupts else math.inf
        if limit > until > 0.0 or limit == math.inf:
            context.decode(rows, choice.n, until, embed=embed)
        else:
            try:
                context.decode(rows, choice.n, limit, embed=embed)
            except Interrupted:
                if context.abort.asked:
                    raise
                # other programs take the cores: the threads wait for each other
                choice.give_up()
                for row in rows:
                    self._cut(row.seq, row.pos)
                begin = time.monotonic()
                context.decode(rows, choice.n, until, embed=embed)
        choice.note(n_tokens, time.monotonic() - begin)

    def _eval_states(self, rows: Sequence[Row], states: Sequence[int], until: float) -> None:
        self._decode([rows[i] for i in states], until, embed=True)
        if self.caps.pair:
            self._scores = {i: self._context.score(rows[i].seq) for i in states}
            return
        n_embd, at = self.info.n_embd_out, 0
        for i in states:
            n = len(rows[i].tokens)
            copy = self._ffi.new("float[]", n * n_embd)
            for j in range(n):
                self._ffi.memmove(copy + j * n_embd, self._context.states(at + j), 4 * n_embd)
            self._states[i] = self._ffi.buffer(copy)
            at += n

    def _check(self, rows: Sequence[Row]) -> None:
        """Raises EngineError for rows over which the library would end the process."""
        caps, n_vocab = self.caps, self.info.n_vocab
        n_all = n_outputs = 0
        for row in rows:
            n = len(row.tokens)
            every = row.want is Want.ALL or row.want in _POOLED
            if not 0 <= row.seq < caps.n_seq:
                raise EngineError(f"there is no sequence {row.seq}; there are {caps.n_seq}")
            if row.adapters != rows[0].adapters:
                raise EngineError("two rows of a step have different LoRA adapters")
            most = caps.n_outputs if every else caps.n_row
            if not 1 <= n <= most:
                raise EngineError(f"a row has {n} tokens; 1 to {most} are allowed")
            n_past = 0 if caps.whole_rows else self._n_past[row.seq]
            if row.pos != n_past or n_past + n > caps.n_ctx:
                raise EngineError(
                    f"position {row.pos} with {n} tokens does not follow {n_past} of {caps.n_ctx} tokens"
                )
            if caps.whole_rows and row.want not in _POOLED:
                raise EngineError("an encoder model has embeddings and no logits")
            if row.want is Want.EMBEDDING and not self.info.n_embd_out:
                raise EngineError("this model has no embeddings")
            if row.want is Want.SCORE and not caps.pair:
                raise EngineError("this model has no rank head")
            for token in row.tokens:
                if type(token) is not int or not 0 <= token < n_vocab:
                    raise EngineError(f"token {token!r} is not in the vocabulary")
            n_all += n
            n_outputs += n if every else row.want is Want.LAST
        if n_all > caps.n_batch or n_outputs > caps.n_outputs_total:
            raise EngineError(
                f"a step has {n_all} tokens and {n_outputs} outputs; the limits are {caps.n_batch} and "
                f"{caps.n_outputs_total}"
            )
        if len(rows) > 1 and len({row.seq for row in rows}) != len(rows):
            raise EngineError("two rows have the same sequence")

    def interrupt(self) -> None:
        """Ends the eval that runs in another thread."""
        if self.caps.interrupts:
            self._context.abort.ask()

    def logits(self, row: int, at: int = -1) -> Any:
        """A `float *` of n_vocab logits of token `at` of a row of the last eval. Raises EngineError."""
        asked = self._row(row)
        n = len(asked.tokens)
        at = at + n if at < 0 else at
        if not 0 <= at < n or not (asked.want is Want.ALL or (asked.want is Want.LAST and at == n - 1)):
            raise EngineError(f"row {row} has no logits of token {at}")
        return self._context.logits(self._places[row] + at)

    def logits_list(self, row: int) -> list[float]:
        """The logits of a row's last token as Python numbers."""
        return list(self._ffi.unpack(self.logits(row), self.info.n_vocab))

    def embedding(self, row: int) -> Any:
        """A buffer of the hidden states of all tokens of a row, n_embd_out float32 each. Raises EngineError."""
        if self._row(row).want is not Want.EMBEDDING:
            raise EngineError(f"row {row} has no hidden states")
        return self._states[row]

    def score(self, row: int) -> float:
        """The score of a row's sequence. Raises EngineError."""
        if self._row(row).want is not Want.SCORE:
            raise EngineError(f"row {row} has no score")
        return self._scores[row]

    def _row(self, row: int) -> Row:
        if not 0 <= row < len(self._rows):
            raise EngineError(f"the last evaluation had no row {row}")
        return self._rows[row]

    # -- sequences ---------------------------------------------------------------------------------

    def truncate(self, seq: int, n: int) -> int:
        """Drops all but the first n tokens of a sequence; returns how many are kept: n, or 0 for recurrent models."""
        held = self._n_past[seq]
        return held if n >= held else self._cut(seq, max(0, n))

    def _cut(self, seq: int, n: int) -> int:
        """Cuts a sequence to n tokens or, where the model cannot go back, to none. Returns its new length."""
        if n and (self.caps.truncates is Truncates.NEVER or not self._context.drop(seq, n)):
            n = 0
        if not n:
            self._context.drop(seq, 0)
        self._n_past[seq] = n
        return n

    def exact_prefix(self, seq: int, n: int, n_prompt: int) -> int:
        """Returns how many of the first n tokens may be reused, see Context."""
        return self._context.exact_prefix(seq, n, n_prompt)

    def copy(self, src: int, dst: int, n: int) -> None:
        """Replaces `dst` by the first n tokens of `src`. Raises EngineError where the model cannot."""
        held = self._n_past[src]
        if not 0 <= n <= held or (self.caps.copies is not Copies.PREFIX and n != held):
            raise EngineError(f"the first {n} of {held} tokens cannot be copied")
        if self.caps.shares_cells:
            self._context.copy(src, dst, n if self.caps.copies is Copies.PREFIX else -1)
        elif not self._context.load(dst, self._context.save(src)):
            # seq_cp would copy the whole stream, and only when the next step begins
            self._n_past[dst] = 0
            raise EngineError("the sequence could not be copied")
        self._n_past[dst] = n

    def save(self, seq: int) -> bytes:
        """The state of a sequence."""
        return self._context.save(seq)

    def load(self, seq: int, state: bytes) -> bool:
        """Replaces a sequence by a saved state; False, and an empty sequence, if the state does not fit."""
        fits = self._context.load(seq, state)
        self._n_past[seq] = self._context.length(seq) if fits else 0
        return fits

    # -- text --------------------------------------------------------------------------------------

    def encode(self, prompt: Sequence[Segment]) -> list[int]:
        """Ids of a prompt. No Text can become a control token. Raises ValueError in words for the client."""
        return self._vocabulary.encode(prompt)

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token; for control tokens none, or with `special` their text."""
        return self._vocabulary.piece(token, special)

    def close(self) -> None:
        """Frees everything. Nothing may be evaluating."""
        self._context.close()
        self._free_model()
