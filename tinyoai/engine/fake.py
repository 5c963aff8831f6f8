"""The scripted engine: bytes are tokens and the logits follow a script. It has no model.

For tests of exact cases, for benchmarks of everything but the model, and for trying a client: `--engine fake`. A
reply repeats the prompt's last message, byte by byte, and ends. A message that begins with "!" and goes on as JSON
is a script, see Script. The logits depend on the tokens that the sequence really holds, so a wrong prefix shows. A
token's hidden state is 1 in its byte's place and 0 elsewhere. A document's score is the number of words that it shares
with the query. Every capability of the contract can be switched on.
"""

import itertools
import os
import signal
import threading
import time
from array import array
from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec

from tinyoai.engine.contract import (
    Capabilities,
    Copies,
    EngineError,
    Interrupted,
    ModelInfo,
    NoRoom,
    PairForm,
    Partial,
    Row,
    Truncates,
    Want,
)
from tinyoai.text.segments import encode
from tinyoai.wire import Segment

BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
N_VOCAB = 260
N_EMBD = 256
TOKEN_MS = "TINYOAI_FAKE_TOKEN_MS"
"""Environment variable: milliseconds that every evaluated token takes."""
CHAT_TEMPLATE = "{{ '<|im_start|>' }}{{ '<|im_end|>' }}"


class Script(msgspec.Struct, frozen=True):
    """A message of the form `!{"text": "abc", "repeat": 3}`."""

    text: str = ""
    repeat: int = 1
    step_ms: float = 0.0
    """Milliseconds of every decode step."""
    prefill_ms: float = 0.0
    """Milliseconds of every prefill row, once the script has been read."""
    spread: float = 0.0
    """Above 0: no text, but logits drawn from a normal distribution of this deviation."""
    nan_at: int = -1
    """The logits before this token of the answer are not finite."""
    fail_at: int = -1
    """The evaluation before this token raises."""
    kill_at: int = -1
    """The evaluation before this token ends the process by SIGKILL."""
    hang_at: int = -1
    """The evaluation before this token never returns."""
    show_threads: bool = False
    """The reply is the list of the limits of threads that were set."""
    tokenize_ms: float = 0.0
    """Tokenizing this message takes so long. The first key of the script, so that the tokenizer sees it."""
    tokenize_kill: bool = False
    """Tokenizing this message ends the process by SIGKILL. The first key of the script, too."""


class FakeEngine:
    """The engine contract over scripted logits. `caps` are fields of Capabilities to change."""

    state_format = "json"

    def __init__(
        self, *, name: str, n_ctx: int = 0, n_slots: int = 4, n_batch: int = 32, **caps: Any
    ) -> None:
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
            add_space_prefix=False,
            n_embd_out=N_EMBD,
            pooling="mean",
        )
        self._token_s = float(os.environ.get(TOKEN_MS, 0)) / 1000.0
        known: dict[str, Any] = {
            "n_seq": n_slots,
            "n_ctx": n_ctx,
            "n_row": n_batch,
            "n_batch": n_batch * n_slots,
            "n_kv": n_ctx * n_slots,
            "n_outputs": 8,
            "pair": PairForm(before=(BOS,), between=(EOS,), after=(EOS,)),
            "step_cost": {1: self._token_s * 1000.0} if self._token_s else {},
        }
        self.caps = Capabilities(**(known | caps))
        self.n_threads = 1
        self.partial: Partial | None = None
        """The next eval raises this after the tokens that it counts."""
        self.n_evals = 0
        self.allowed: list[int] = []
        """The limits of threads that were set, in order."""
        self._interrupt = threading.Event()
        self._tokens: list[list[int]] = [[] for _ in range(n_slots)]
        self._cells: list[list[int]] = [[] for _ in range(n_slots)]
        """By sequence: a number for the KV cell of each token. A copied prefix has the same cells."""
        self._new_cells = itertools.count()
        self._replies: list[_Reply | None] = [None] * n_slots
        self._outputs: list[list[array[float]]] = []
        """Of the last eval: for each row the logits, or the states, of its tokens."""
        self._spare: dict[int, tuple[array[float], int]] = {}
        """By sequence: a logits buffer to use again, and where it is not zero."""
        self._pieces = [bytes([i]) for i in range(256)] + [b""] * 4
        self._texts = {token: text.encode() for text, token in self.info.special.items()}

    # -- text ------------------------------------------------------------------------------------

    def encode(self, prompt: Sequence[Segment]) -> list[int]:
        """See Engine."""
        return encode(prompt, self)

    def tokenize(self, text: str) -> list[int]:
        """The UTF-8 bytes. Raises ValueError for lone surrogates."""
        at = text.find('!{"tokenize')
        if at >= 0:
            script = _plan(text[at:].encode(), 0).script
            if script.tokenize_kill:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(script.tokenize_ms / 1000)
        return list(text.encode())

    def piece(self, token: int, special: bool = False) -> bytes:
        """See Engine."""
        return self._texts.get(token, b"") if special and token >= 256 else self._pieces[token]

    # -- evaluating ------------------------------------------------------------------------------

    def eval(self, rows: Sequence[Row], until: float = 0.0) -> None:
        """See Engine. Raises EngineError where a script says so, and Interrupted while it takes TOKEN_MS."""
        self.n_evals += 1
        caps, n_all = self.caps, sum(len(row.tokens) for row in rows)
        if sum(map(len, self._cells)) + n_all > caps.n_kv and self._n_cells() + n_all > caps.n_kv:
            raise NoRoom
        if n_all > caps.n_batch:
            raise EngineError(f"the batch has {n_all} tokens; the limit is {caps.n_batch}")
        for row in rows:
            self._check(row)
        partial, self.partial = self.partial, None
        self._outputs = []
        if self._token_s:
            self._work(self._token_s * n_all, until)
        for i, row in enumerate(rows):
            done = row.tokens if partial is None else row.tokens[: partial.done[i]]
            self._outputs.append(self._eval_row(row, done))
            self._cells[row.seq] += itertools.islice(self._new_cells, len(done))
        if partial is not None:
            raise partial

    def _n_cells(self) -> int:
        """KV cells in use."""
        return len({cell for cells in self._cells for cell in cells})

    def limit_threads(self, n: int) -> None:
        """See Engine."""
        self.allowed.append(n)

    def _work(self, seconds: float, until: float) -> None:
        """Takes the time of an evaluation. Raises Interrupted."""
        if not self.caps.interrupts:
            time.sleep(seconds)
            return
        self._interrupt.clear()
        left = max(0.0, until - time.monotonic()) if until else seconds
        if self._interrupt.wait(min(seconds, left)) or left < seconds:
            raise Interrupted

    def interrupt(self) -> None:
        """See Engine."""
        self._interrupt.set()

    def _check(self, row: Row) -> None:
        held = len(self._tokens[row.seq])
        if row.pos != held or held + len(row.tokens) > self.info.n_ctx:
            raise EngineError(f"position {row.pos} does not follow {held} evaluated tokens")
        most = self.caps.n_outputs if row.want in (Want.ALL, Want.EMBEDDING) else self.caps.n_row
        if self.caps.pools or self.caps.whole_rows:
            most = self.caps.n_row
        if not 1 <= len(row.tokens) <= most:
            raise EngineError(f"a row has {len(row.tokens)} tokens; 1 to {most} are allowed")

    def _eval_row(self, row: Row, done: Sequence[int]) -> list["array[float]"]:
        tokens = self._tokens[row.seq]
        outputs: list[array[float]] = []
        if row.want in (Want.NOTHING, Want.LAST, Want.SCORE):
            tokens.extend(done)
            if done:
                logits = self._answer(row.seq, tokens, Row(row.seq, done, row.pos))
                # a generated control token can begin another turn, whose logits follow no script
                outputs.append(logits if logits is not None else _zeros())
            if row.want is Want.SCORE:
                outputs = [array("f", [_shared_words(tokens)])]
            return outputs
        for token in done:
            tokens.append(token)
            if token == ord("\n"):
                self._replies[row.seq] = None  # a script may be complete now
            logits = self._answer(row.seq, tokens, Row(row.seq, [token], len(tokens) - 1))
            if row.want is Want.EMBEDDING:
                outputs.append(_state(token))
            else:
                outputs.append(array("f", logits) if logits is not None else _zeros())
        return outputs

    def logits(self, row: int, at: int = -1) -> Any:
        """See Engine."""
        return self._outputs[row][at]

    def embedding(self, row: int) -> Any:
        """See Engine. A text's embedding is the sum of its states."""
        states = self._outputs[row]
        if not self.caps.pools:
            return array("f", [value for state in states for value in state])
        return array("f", map(sum, zip(*states, strict=True)))

    def score(self, row: int) -> float:
        """See Engine."""
        return self._outputs[row][0][0]

    # -- sequences -------------------------------------------------------------------------------

    def truncate(self, seq: int, n: int) -> int:
        """See Engine. Checkpoints are at multiples of 16."""
        tokens = self._tokens[seq]
        if n < len(tokens):
            if self.caps.truncates is Truncates.CHECKPOINTS:
                n -= n % 16
            elif self.caps.truncates is Truncates.NEVER:
                n = 0
        del tokens[n:]
        del self._cells[seq][n:]
        self._replies[seq] = None
        return len(tokens)

    def exact_prefix(self, seq: int, n: int, n_prompt: int) -> int:
        """See Engine."""
        return n

    def copy(self, src: int, dst: int, n: int) -> None:
        """See Engine."""
        if self.caps.copies is Copies.NONE or (
            self.caps.copies is Copies.WHOLE and n != len(self._tokens[src])
        ):
            raise EngineError("this copy is not possible")
        self._tokens[dst] = self._tokens[src][:n]
        self._cells[dst] = self._cells[src][:n]
        self._replies[dst] = None

    def save(self, seq: int) -> bytes:
        """See Engine."""
        if not self.caps.saves:
            raise EngineError("sequences cannot be saved")
        return msgspec.json.encode(self._tokens[seq])

    def load(self, seq: int, state: bytes) -> bool:
        """See Engine."""
        self._replies[seq] = None
        try:
            tokens = msgspec.json.decode(state, type=list[int])
        except msgspec.MsgspecError:
            tokens = []
        self._tokens[seq] = tokens
        self._cells[seq] = list(itertools.islice(self._new_cells, len(tokens)))
        return bool(tokens)

    def close(self) -> None:
        """See Engine."""

    # -- scripts ---------------------------------------------------------------------------------

    def _answer(self, seq: int, tokens: list[int], row: Row) -> "array[float] | None":
        """The logits after `tokens`; None in the middle of a prompt, where nothing reads them."""
        reply = self._replies[seq]
        # a plain prompt may come in pieces: without its newline it is treated as one that has none
        unread = reply is None or row.pos < reply.start or (reply.text is None and 10 in row.tokens)
        if reply is None or unread or IM_START in row.tokens:
            reply = _reply(tokens)
            if reply.script.show_threads:
                reply = _Reply(reply.script, str(self.allowed).encode(), reply.start)
            self._replies[seq] = reply
        script, at = reply.script, len(tokens) - reply.start
        pause = script.step_ms if len(row.tokens) == 1 else script.prefill_ms
        if pause:
            time.sleep(pause / 1000)
        if at < 0:
            return None
        if at == script.fail_at:
            raise EngineError("the script asked for a failure")
        if at == script.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        while at == script.hang_at:
            time.sleep(1)
        if script.spread > 0:
            draw = Random(repr(tokens))
            return array("f", (draw.gauss(0, script.spread) for _ in range(N_VOCAB)))
        logits, before = self._spare.get(seq) or (_zeros(), 0)
        logits[before] = 0.0
        peak = EOS
        if reply.text is None:
            peak = 97 + (tokens[-1] - 96) % 26
        elif at < len(reply.text):
            peak = reply.text[at]
        logits[peak] = float("nan") if at == script.nan_at else 40.0
        self._spare[seq] = (logits, peak)
        return logits


def _zeros() -> "array[float]":
    return array("f", bytes(4 * N_VOCAB))


def _shared_words(tokens: Sequence[int]) -> int:
    """The words that a query and a document have in common."""
    query, _, document = bytes(t if t < 256 else 0 for t in tokens[1:]).partition(b"\0")
    return len(set(query.split()) & set(document.rstrip(b"\0").split()))


def _state(token: int) -> "array[float]":
    state = array("f", bytes(4 * N_EMBD))
    if token < N_EMBD:
        state[token] = 1.0
    return state


class _Reply(msgspec.Struct, frozen=True):
    """A reply in a sequence: its script, its bytes (None: the alphabet, endlessly), and where they begin."""

    script: Script
    text: bytes | None
    start: int


def _plan(said: bytes, start: int) -> _Reply:
    """The reply to a message: its script, or the message repeated."""
    script = Script(text=said.decode("utf-8", "replace"))
    if said.startswith(b"!"):
        try:
            script = msgspec.json.decode(said[1:], type=Script)
        except msgspec.MsgspecError as error:
            script = Script(text=f"not a script: {error}")
    return _Reply(script, script.text.encode() * script.repeat, start)


def _reply(tokens: list[int]) -> _Reply:
    """The reply to the last message; a plain prompt's message ends at its first newline."""
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
