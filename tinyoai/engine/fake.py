"""A third engine, without a model: bytes are tokens and the logits follow a script.

For tests that need an exact case, for benchmarks of everything but the model, and for trying a
client: `--engine fake`. A reply repeats what the prompt's last message said, byte by byte, and ends.
A message that begins with "!" and goes on as JSON is a script instead, see Script. The logits depend
on what the slot's KV cache really holds, so a wrong prefix is seen. A token's state is 1 in its byte's
place and 0 in all others, so that a text's embedding is how often it has each byte.
"""

import os
import signal
import time
from array import array
from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec

from tinyoai.engine.contract import EngineError, ModelInfo, Row

BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
N_VOCAB = 260
N_EMBD = 256
CHAT_TEMPLATE = "{{ '<|im_start|>' }}{{ '<|im_end|>' }}"


class Script(msgspec.Struct, frozen=True):
    """What a message of the form `!{"text": "abc", "repeat": 3}` asks for."""

    text: str = ""
    repeat: int = 1
    step_ms: float = 0.0
    """Every evaluation that answers this takes so long."""
    prefill_ms: float = 0.0
    """Every prefill chunk of this takes so long, once the script has been read."""
    spread: float = 0.0
    """Above 0: no text but logits drawn from a normal distribution of this deviation."""
    nan_at: int = -1
    """The logits before this token of the answer are not finite."""
    fail_at: int = -1
    """The evaluation before this token raises."""
    kill_at: int = -1
    """The evaluation before this token ends the process by SIGKILL."""
    hang_at: int = -1
    """The evaluation before this token never returns."""


class FakeEngine:
    """The Engine protocol over scripted logits; `tokenize` gives UTF-8 bytes."""

    def __init__(self, *, name: str, n_ctx: int = 0, n_slots: int = 4, n_batch: int = 32) -> None:
        n_ctx = n_ctx or 4096
        self.info = ModelInfo(
            name=name,
            architecture="fake",
            quantization="none",
            n_params=0,
            n_vocab=N_VOCAB,
            n_ctx=n_ctx,
            n_ctx_train=n_ctx,
            n_embd=N_EMBD,
            file_size=0,
            bos_id=BOS,
            eos_id=EOS,
            eog_ids=(EOS, IM_END),
            special={"<s>": BOS, "</s>": EOS, "<|im_start|>": IM_START, "<|im_end|>": IM_END},
            chat_template=CHAT_TEMPLATE,
            add_bos=True,
            engine="fake",
            first_piece_space=False,
            n_embd_out=N_EMBD,
            pooling="mean",
        )
        self.n_slots = n_slots
        self.n_batch = n_batch
        self.block = 1
        self.longest_piece = 1
        self._tokens: list[list[int]] = [[] for _ in range(n_slots)]
        self._logits = [array("f", bytes(4 * N_VOCAB)) for _ in range(n_slots)]
        self._peaks = [0] * n_slots
        self._replies: list[_Reply | None] = [None] * n_slots
        self._pieces = [bytes([i]) for i in range(256)] + [b""] * 4

    def tokenize(self, text: str) -> list[int]:
        """The UTF-8 bytes. Raises ValueError for lone surrogates."""
        return list(text.encode())

    def piece(self, token: int) -> bytes:
        """The byte that a token is; nothing for control tokens."""
        return self._pieces[token]

    def eval(self, rows: Sequence[Row], threads: int) -> None:
        """Writes each row's slot's logits. Raises EngineError where a script says so."""
        for row in rows:
            tokens = self._tokens[row.slot]
            if not 0 <= row.n_past <= len(tokens) or row.n_past + len(row.tokens) > self.info.n_ctx:
                raise EngineError(f"position {row.n_past} does not follow {len(tokens)} evaluated tokens")
            if not 1 <= len(row.tokens) <= self.n_batch:
                raise EngineError(f"a row has {len(row.tokens)} tokens; 1 to {self.n_batch} are allowed")
            del tokens[row.n_past :]
            if row.seen is None:
                tokens.extend(row.tokens)
                self._answer(row.slot, tokens, row)
                continue
            for token in row.tokens:
                tokens.append(token)
                if token == ord("\n"):
                    self._replies[row.slot] = None  # a script may be complete now
                self._answer(row.slot, tokens, Row(row.slot, [token], len(tokens) - 1))
                row.seen(self.state(row.slot))

    def logits(self, slot: int) -> Any:
        """n_vocab float32 values, valid until the slot's next eval."""
        return self._logits[slot]

    def state(self, slot: int) -> Any:
        """1 in the place of the last token's byte; zeros for a control token."""
        state = array("f", bytes(4 * N_EMBD))
        last = self._tokens[slot][-1]
        if last < N_EMBD:
            state[last] = 1.0
        return state

    def close(self) -> None:
        """Nothing to give back."""

    def _answer(self, slot: int, tokens: list[int], row: Row) -> None:
        reply = self._replies[slot]
        # a plain prompt may come in pieces: without its newline it is taken for one that has none
        unread = reply is None or row.n_past < reply.start or (reply.text is None and 10 in row.tokens)
        if reply is None or unread or IM_START in row.tokens:
            reply = self._replies[slot] = _reply(tokens)
        script, at = reply.script, len(tokens) - reply.start
        pause = script.step_ms if len(row.tokens) == 1 else script.prefill_ms
        if pause:
            time.sleep(pause / 1000)
        if at < 0:
            return  # in the middle of a prompt: nobody reads these logits
        if at == script.fail_at:
            raise EngineError("the script asked for a failure")
        if at == script.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        while at == script.hang_at:
            time.sleep(1)
        if script.spread > 0:
            draw = Random(repr(tokens))
            self._logits[slot] = array("f", (draw.gauss(0, script.spread) for _ in range(N_VOCAB)))
            return
        logits = self._logits[slot]
        logits[self._peaks[slot]] = 0.0
        peak = EOS
        if reply.text is None:
            peak = 97 + (tokens[-1] - 96) % 26
        elif at < len(reply.text):
            peak = reply.text[at]
        logits[peak] = float("nan") if at == script.nan_at else 40.0
        self._peaks[slot] = peak


class _Reply(msgspec.Struct, frozen=True):
    """What follows in a slot: the script, the bytes (None: the alphabet for ever), where they begin."""

    script: Script
    text: bytes | None
    start: int


def _plan(said: bytes, start: int) -> _Reply:
    """The script that a message is, or else means."""
    script = Script(text=said.decode("utf-8", "replace"))
    if said.startswith(b"!"):
        try:
            script = msgspec.json.decode(said[1:], type=Script)
        except msgspec.MsgspecError as error:
            script = Script(text=f"not a script: {error}")
    return _Reply(script, script.text.encode() * script.repeat, start)


def _reply(tokens: list[int]) -> _Reply:
    """Reads the last message before the reply; a plain prompt's is all before its first newline."""
    if IM_START not in tokens:
        text = bytes(t if t < 256 else 0 for t in tokens)
        if b"\n" not in text:
            return _Reply(Script(), None, len(tokens))
        end = text.index(b"\n")
        return _plan(text[:end].lstrip(b"\0"), end + 1)
    opening = len(tokens) - 1 - tokens[::-1].index(IM_START)
    start = opening + 1 + len(b"assistant\n")
    before = tokens[:opening]
    if IM_START not in before:
        return _plan(b"", start)
    begins = len(before) - 1 - before[::-1].index(IM_START)
    message = bytes(t for t in before[begins + 1 :] if t < 256)
    # the template puts a newline after each message's end
    return _plan(message.partition(b"\n")[2].removesuffix(b"\n"), start)
