"""A llama_context with its batch: one call of llama_decode, and the KV sequences.

libllama ends the process over arguments out of range; the engine checks rows before they come here.
"""

from collections.abc import Sequence
from typing import Any

from tinyoai.engine.contract import EngineError, Interrupted, NoRoom, Row, Want
from tinyoai.engine.llamacpp.hooks import Abort
from tinyoai.engine.llamacpp.library import Library

MIN_PREFIX = 8
"""Tokens of a prefix that are worth reusing where equal requests should get equal answers."""
_OK, _NO_ROOM, _ABORTED, _INVALID = 0, 1, 2, -1


class Context:
    """KV sequences and compute buffers of one model. One thread calls it, but for `abort.ask`."""

    def __init__(self, library: Library, pointer: Any, n_batch: int) -> None:
        """`pointer` is a `llama_context *`."""
        ffi = library.ffi
        self._ffi, self._lib, self._ctx = ffi, library.lib, pointer
        self._memory = self._lib.llama_get_memory(pointer) or None
        """None for most encoders."""
        self._allocate = ffi.new_allocator(should_clear_after_alloc=False)
        """Memory that is written at once, as states are, which can have hundreds of megabytes."""
        self._n_batch = n_batch
        self._tokens = ffi.new("llama_token[]", n_batch)
        self._pos = ffi.new("int32_t[]", n_batch)
        self._n_seq_id = ffi.new("int32_t[]", [1] * n_batch)
        self._seq = ffi.new("int32_t[]", n_batch)
        self._seq_id = ffi.new("int32_t *[]", [self._seq + i for i in range(n_batch)])
        self._wanted = ffi.new("int8_t[]", n_batch)
        self._batch = ffi.new("llama_batch *")
        self._batch.token, self._batch.pos = self._tokens, self._pos
        self._batch.n_seq_id, self._batch.seq_id = self._n_seq_id, self._seq_id
        self._batch.logits = self._wanted
        self._n_threads = 0
        self._embeds = False
        self.abort = Abort()
        self._lib.llama_set_abort_callback(
            pointer, ffi.cast("void *", Abort.callback), ffi.cast("void *", self.abort.address)
        )

    # -- evaluating --------------------------------------------------------------------------------

    def decode(self, rows: Sequence[Row], n_threads: int, until: float, *, embed: bool) -> None:
        """Evaluates rows in one call. Raises NoRoom, and then nothing changed; or Interrupted or EngineError.

        After the last two the rows' sequences have to be cut back.
        """
        if n_threads != self._n_threads:
            self._n_threads = n_threads
            self._lib.llama_set_n_threads(self._ctx, n_threads, n_threads)
        if embed != self._embeds:
            self._embeds = embed
            self._lib.llama_set_embeddings(self._ctx, embed)
        self._fill(rows)
        self.abort.arm(until)
        code = self._lib.llama_decode(self._ctx, self._batch[0])
        if code == _OK:
            return
        if code == _NO_ROOM:
            raise NoRoom
        if code == _ABORTED:
            raise Interrupted
        raise EngineError(
            "llama.cpp could not evaluate these tokens"
            if code == _INVALID
            else "llama.cpp could not compute this step; memory may be short"
        )

    def use_adapters(self, adapters: Sequence[Any], scales: Sequence[float]) -> None:
        """Applies LoRA adapters, each a `llama_adapter_lora *`, from the next decode on. Raises EngineError."""
        pointers, factors = (
            self._ffi.new("llama_adapter_lora *[]", adapters),
            self._ffi.new("float[]", scales),
        )
        if self._lib.llama_set_adapters_lora(self._ctx, pointers, len(adapters), factors):
            raise EngineError("llama.cpp could not apply these LoRA adapters")

    def _fill(self, rows: Sequence[Row]) -> None:
        at = 0
        tokens, pos, seq, wanted = self._tokens, self._pos, self._seq, self._wanted
        for row in rows:
            n = len(row.tokens)
            if n == 1:
                tokens[at], pos[at], seq[at] = row.tokens[0], row.pos, row.seq
                wanted[at] = row.want is not Want.NOTHING
                at += 1
                continue
            end = at + n
            tokens[at:end] = row.tokens
            pos[at:end] = range(row.pos, row.pos + n)
            seq[at:end] = [row.seq] * n
            every = row.want in (Want.ALL, Want.EMBEDDING, Want.SCORE)
            wanted[at:end] = [every] * n
            wanted[end - 1] = row.want is not Want.NOTHING
            at = end
        self._batch.n_tokens = at

    def logits(self, at: int) -> Any:
        """The logits of the token at a place of the batch: a `float *`, valid until the next decode."""
        pointer = self._lib.llama_get_logits_ith(self._ctx, at)
        if not pointer:
            raise EngineError(f"llama.cpp has no logits of token {at}")
        return pointer

    def states(self, at: int) -> Any:
        """The hidden state of the token at a place of the batch: a `float *`, valid until the next decode."""
        pointer = self._lib.llama_get_embeddings_ith(self._ctx, at)
        if not pointer:
            raise EngineError(f"llama.cpp has no hidden state of token {at}")
        return pointer

    def score(self, seq: int) -> float:
        """The score of a sequence's tokens in the last decode with `embed`."""
        pointer = self._lib.llama_get_embeddings_seq(self._ctx, seq)
        if not pointer:
            raise EngineError(f"llama.cpp has no score of sequence {seq}")
        return float(pointer[0])

    # -- sequences ---------------------------------------------------------------------------------

    def length(self, seq: int) -> int:
        """Tokens in a sequence."""
        if self._memory is None:
            return 0
        return int(self._lib.llama_memory_seq_pos_max(self._memory, seq)) + 1

    def drop(self, seq: int, n: int) -> bool:
        """Drops all but the first n tokens. False, and nothing changes, where the model cannot go back to n."""
        if self._memory is None:
            return True
        return bool(self._lib.llama_memory_seq_rm(self._memory, seq, n if n else -1, -1))

    def exact_prefix(self, seq: int, n: int, n_prompt: int) -> int:
        """How many of the first n tokens may be reused for a prompt of n_prompt tokens whose answer should be exact.

        Other cuts of a prompt and other company may change low bits; a few tokens save too little for that.
        """
        return n if n >= MIN_PREFIX else 0

    def copy(self, src: int, dst: int, n: int) -> None:
        """Replaces `dst` by the first n tokens of `src`; n = -1: by all of it, the only way for recurrent states."""
        if self._memory is None:
            return
        self.drop(dst, 0)
        first, end = (0, n) if n >= 0 else (-1, -1)
        self._lib.llama_memory_seq_cp(self._memory, src, dst, first, end)

    def save(self, seq: int) -> bytes:
        """The state of a sequence."""
        size = self._lib.llama_state_seq_get_size(self._ctx, seq)
        buffer = self._allocate("uint8_t[]", size)
        n = self._lib.llama_state_seq_get_data(self._ctx, buffer, size, seq)
        return bytes(self._ffi.buffer(buffer, n))

    def load(self, seq: int, state: bytes) -> bool:
        """Replaces a sequence by a saved state; False, and an empty sequence, if it does not fit."""
        self.drop(seq, 0)
        if state and self._lib.llama_state_seq_set_data(
            self._ctx, self._ffi.from_buffer("uint8_t[]", state), len(state), seq
        ):
            return True
        self.drop(seq, 0)
        return False

    def close(self) -> None:
        """Frees the context."""
        self._lib.llama_free(self._ctx)
