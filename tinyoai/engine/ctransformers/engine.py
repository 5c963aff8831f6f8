"""A model in ctransformers' library, behind the engine contract.

The library evaluates one sequence in a call and keeps the outputs of its last token alone. Here rows of several
sequences run side by side, and rows that want more are evaluated token by token.
"""

import threading
from collections.abc import Sequence
from typing import Any

from tinyoai.engine import threads
from tinyoai.engine.contract import Capabilities, EngineError, Row, Want
from tinyoai.engine.ctransformers.crew import Crew
from tinyoai.engine.ctransformers.exact_prefix import ATTN_BLOCK
from tinyoai.engine.ctransformers.library import Handle, Loader
from tinyoai.engine.ctransformers.vocabulary import Vocabulary, split_text
from tinyoai.text import segments
from tinyoai.wire import ModelInfo, Segment

MAX_ROW = 512
"""The library's compute buffer is sized for so many tokens; more end the process."""
N_OUTPUTS = 8
"""Tokens of a row that wants outputs of every token: such rows are slow, and others wait for them."""


class CTransformersEngine:
    """One loaded model: a handle for each sequence, made when the sequence is first used."""

    state_format = ""

    def __init__(
        self,
        loader: Loader,
        info: ModelInfo,
        vocabulary: Vocabulary,
        n_seq: int,
        n_row: int,
        first: Handle | None = None,
    ) -> None:
        self.info = info
        self.caps = Capabilities(
            n_seq=n_seq,
            n_ctx=info.n_ctx,
            n_batch=n_row * n_seq,
            n_row=n_row,
            n_kv=info.n_ctx * n_seq,
            n_outputs=N_OUTPUTS,
            align=ATTN_BLOCK,
            longest_piece=vocabulary.longest_piece,
        )
        self.n_threads = 1
        self._loader = loader
        self._vocabulary = vocabulary
        self._handles: list[Handle | None] = [first, *[None] * (n_seq - 1)]
        self._rows: Sequence[Row] = ()
        """The rows of the last eval, whose outputs may be read."""
        self._tokenizing = threading.Lock()
        self._allowed = 1 << 30
        """Threads of a step, at most, whether they share a row or evaluate rows side by side."""
        self._crew = Crew(min(threads.available(), n_seq) - 1, self._eval_row)

    def handle(self, seq: int) -> Handle:
        """The handle of a sequence; sequence 0's tokenizes too. Raises EngineError if it cannot be loaded."""
        handle = self._handles[seq]
        if handle is None:
            handle = self._handles[seq] = self._loader.load(self.caps.n_row)
            if handle is None:
                raise EngineError(
                    f"ctransformers cannot load the model {self.info.name}, although its header is valid"
                )
        return handle

    def limit_threads(self, n: int) -> None:
        """From the next eval on, at most n threads are used: the library takes their number with each call."""
        self._allowed = n

    # -- evaluating --------------------------------------------------------------------------------

    def eval(self, rows: Sequence[Row], until: float = 0.0) -> None:
        """Evaluates rows of distinct sequences, side by side. Raises EngineError; then no outputs can be read."""
        self._rows = ()
        for row in rows:
            self._check(row)
        n = len(rows)
        if n == 1:
            self._eval_row(rows[0], min(self.n_threads, self._allowed))
        else:
            if len({row.seq for row in rows}) != n:
                raise EngineError("two rows have the same sequence")
            self._crew.evaluate(
                rows, max(1, min(self.n_threads, self._allowed) // n), n_at_once=self._allowed
            )
        self._rows = rows

    def interrupt(self) -> None:
        """Nothing: caps.interrupts is False."""

    def _check(self, row: Row) -> None:
        caps = self.caps
        if not 0 <= row.seq < caps.n_seq:
            raise EngineError(f"there is no sequence {row.seq}; there are {caps.n_seq}")
        if row.adapters:
            raise EngineError("ctransformers cannot apply LoRA adapters")
        n_past, n = self.handle(row.seq).n_past, len(row.tokens)
        most = caps.n_row if row.want in (Want.LAST, Want.NOTHING) else caps.n_outputs
        if not 1 <= n <= most:
            raise EngineError(f"a row has {n} tokens; 1 to {most} are allowed")
        if row.pos != n_past or n_past + n > caps.n_ctx:
            raise EngineError(
                f"position {row.pos} with {n} tokens does not follow {n_past} of {caps.n_ctx} tokens"
            )
        if row.want is Want.SCORE:
            raise EngineError("this model has no rank head")
        if row.want is Want.EMBEDDING and not self.info.n_embd_out:
            raise EngineError("the library has no hidden states of this model")
        n_vocab = self.info.n_vocab
        for token in row.tokens:
            if type(token) is not int or not 0 <= token < n_vocab:
                raise EngineError(f"token {token!r} is not in the vocabulary")

    def _eval_row(self, row: Row, n_threads: int) -> None:
        handle = self.handle(row.seq)
        if row.want is Want.ALL or row.want is Want.EMBEDDING:
            handle.eval_each(row.tokens, n_threads, self.caps.n_outputs, row.want is Want.EMBEDDING)
        else:
            handle.eval(row.tokens, n_threads)

    def logits(self, row: int, at: int = -1) -> Any:
        """A `float *` of n_vocab logits of token `at` of a row of the last eval. Raises EngineError."""
        asked = self._row(row)
        n = len(asked.tokens)
        at = at + n if at < 0 else at
        handle = self.handle(asked.seq)
        if asked.want is Want.LAST and at == n - 1:
            return handle.logits
        if asked.want is Want.ALL and 0 <= at < n:
            return handle.token_logits(at)
        raise EngineError(f"row {row} has no logits of token {at}")

    def embedding(self, row: int) -> Any:
        """A buffer of the hidden states of all tokens of a row, n_embd_out float32 each. Raises EngineError."""
        asked = self._row(row)
        if asked.want is not Want.EMBEDDING:
            raise EngineError(f"row {row} has no hidden states")
        return self.handle(asked.seq).token_states(len(asked.tokens))

    def score(self, row: int) -> float:
        """Raises EngineError: the library runs no model that ranks."""
        raise EngineError("this model has no rank head")

    def _row(self, row: int) -> Row:
        if not 0 <= row < len(self._rows):
            raise EngineError(f"the last evaluation had no row {row}")
        return self._rows[row]

    # -- sequences ---------------------------------------------------------------------------------

    def truncate(self, seq: int, n: int) -> int:
        """Drops all but the first n tokens of a sequence; returns how many are kept."""
        handle = self._handles[seq]
        return handle.truncate(n) if handle is not None else 0

    def exact_prefix(self, seq: int, n: int, n_prompt: int) -> int:
        """Returns how many of the first n tokens of `seq` equal a fresh prefill of n_prompt tokens bit for bit."""
        handle = self._handles[seq]
        return handle.exact.length(n, n_prompt) if handle is not None else 0

    def copy(self, src: int, dst: int, n: int) -> None:
        """Raises EngineError: caps.copies is NONE."""
        raise EngineError("ctransformers cannot copy a sequence")

    def save(self, seq: int) -> bytes:
        """Raises EngineError: caps.saves is False."""
        raise EngineError("ctransformers cannot save a sequence")

    def load(self, seq: int, state: bytes) -> bool:
        """Raises EngineError: caps.saves is False."""
        raise EngineError("ctransformers cannot load a sequence")

    # -- text --------------------------------------------------------------------------------------

    def encode(self, prompt: Sequence[Segment]) -> list[int]:
        """Ids of a prompt. No Text can become a control token. Raises ValueError in words for the client."""
        return segments.encode(prompt, self)

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text, never control tokens. Raises ValueError for text that the library would misread."""
        if "\0" in text:
            raise ValueError("the text contains a NUL character, which the tokenizer cannot take")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text contains half of a surrogate pair; send whole characters") from None
        parts = [text] if self.info.add_space_prefix else split_text(text)
        handle = self.handle(0)
        with self._tokenizing:
            ids = [token for part in parts for token in handle.tokenize(part)]
        return self._vocabulary.plain(ids)

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token; for control tokens none, or with `special` their text."""
        return self._vocabulary.piece(token, special)

    def close(self) -> None:
        """Frees everything. Nothing may be evaluating."""
        self._crew.close()
        for i, handle in enumerate(self._handles):
            if handle is not None:
                handle.close()
                self._handles[i] = None
