"""The reproducible mode: a result depends on the tokens before it and on nothing else.

llama.cpp computes a row with other kernels, and so with other low bits, when the number of rows of a call changes:
8 rows or more for many quantized types, 2 or more for float weights, 64 or more in the attention. Here each call has
tokens of one sequence. A prompt is cut at multiples of a block, so that the call for a block is the same in every
prompt that contains it, and a decoded token has a call of its own. Each sequence has a stream of KV cells of its own.
"""

import contextlib
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from tinyoai import wire
from tinyoai.engine.contract import Capabilities, Engine, EngineError, Interrupted, Row, Want
from tinyoai.engine.llamacpp.context import Context
from tinyoai.engine.llamacpp.library import CPUINFO, Library
from tinyoai.errors import UsageError
from tinyoai.host import datadir

FILE = "self-tests.json"
MAX_RESULTS = 64
"""Results that are kept; the oldest go first."""
_MARK = 4
"""Bytes before a saved state: the number of its tokens that are in whole blocks."""


class OneByOneContext(Context):
    """A context that evaluates each row in calls of its own. `block` 0: a row is one call."""

    def __init__(
        self,
        library: Library,
        pointer: Any,
        caps: Capabilities,
        info: wire.ModelInfo,
        *,
        block: int,
        n_threads: int,
    ) -> None:
        super().__init__(library, pointer, caps.n_batch)
        self._single_threads = n_threads
        """Threads of a call with one token: the number changes the results of long sequences."""
        self._block = block
        self._n_floats = {False: info.n_vocab, True: info.n_embd_out}
        """Numbers of one output: logits, or with True a hidden state."""
        self._n_whole = [0] * caps.n_seq
        """For each sequence the first tokens that were evaluated in calls of whole blocks."""
        self._ranks = caps.pair is not None
        self._scores: dict[int, float] = {}
        """By sequence, of the last rows."""
        self._outputs: dict[int, Any] = {}
        """Copies of the last outputs by their place among the tokens of all rows."""

    def decode(self, rows: Sequence[Row], n_threads: int, until: float, *, embed: bool) -> None:
        """See Context."""
        self._outputs.clear()
        self._scores.clear()
        place, first = 0, True
        for row in rows:
            for piece in self._pieces(row):
                if not first and self.abort.asked:
                    raise Interrupted
                n = n_threads if len(piece.tokens) > 1 else self._single_threads
                super().decode([piece], n, until, embed=embed)
                first = False
                self._note(piece)
                self._keep_outputs(piece, place, embed=embed)
                place += len(piece.tokens)

    def _pieces(self, row: Row) -> list[Row]:
        """The row in calls that end at multiples of the block."""
        n, block = len(row.tokens), self._block
        if not block or row.pos % block + n <= block:
            return [row]
        cuts = [0, *range(block - row.pos % block, n, block), n]
        pieces = []
        for begin, end in pairwise(cuts):
            want = Want.NOTHING if row.want is Want.LAST and end < n else row.want
            pieces.append(Row(row.seq, row.tokens[begin:end], row.pos + begin, want, row.adapters))
        return pieces

    def _note(self, piece: Row) -> None:
        if self._n_whole[piece.seq] == piece.pos and len(piece.tokens) == self._block:
            self._n_whole[piece.seq] += self._block

    def _keep_outputs(self, piece: Row, place: int, *, embed: bool) -> None:
        """Copies outputs, which the next call overwrites."""
        if piece.want is Want.NOTHING:
            return
        if embed and self._ranks:
            self._scores[piece.seq] = super().score(piece.seq)
            return
        n = len(piece.tokens)
        size = self._n_floats[embed]
        for at in range(n - 1 if piece.want is Want.LAST else 0, n):
            pointer = super().states(at) if embed else super().logits(at)
            copy = self._ffi.new("float[]", size)
            self._ffi.memmove(copy, pointer, 4 * size)
            self._outputs[place + at] = copy

    def logits(self, at: int) -> Any:
        """See Context."""
        return self._output(at)

    def states(self, at: int) -> Any:
        """See Context."""
        return self._output(at)

    def score(self, seq: int) -> float:
        """See Context."""
        return self._scores[seq]

    def _output(self, at: int) -> Any:
        if at not in self._outputs:
            raise EngineError(f"llama.cpp has no output of token {at}")
        return self._ffi.cast("float *", self._outputs[at])

    # -- sequences ---------------------------------------------------------------------------------

    def exact_prefix(self, seq: int, n: int, n_prompt: int) -> int:
        """The whole blocks among the first n tokens that are whole blocks of a prompt of n_prompt tokens too."""
        if not self._block:
            return 0
        return min(n, self._n_whole[seq], n_prompt - 1) // self._block * self._block

    def drop(self, seq: int, n: int) -> bool:
        """See Context."""
        dropped = super().drop(seq, n)
        if dropped and self._block:
            self._n_whole[seq] = min(self._n_whole[seq], n // self._block * self._block)
        return dropped

    def copy(self, src: int, dst: int, n: int) -> None:
        """See Context."""
        super().copy(src, dst, n)
        self._n_whole[dst] = self._n_whole[src]
        if n >= 0 and self._block:
            self._n_whole[dst] = min(self._n_whole[dst], n // self._block * self._block)

    def save(self, seq: int) -> bytes:
        """See Context."""
        return self._n_whole[seq].to_bytes(_MARK, "little") + super().save(seq)

    def load(self, seq: int, state: bytes) -> bool:
        """See Context."""
        n_whole = int.from_bytes(state[:_MARK], "little")
        fits = super().load(seq, state[_MARK:])
        self._n_whole[seq] = min(n_whole, self.length(seq)) if fits else 0
        return fits


# -- the self-test -----------------------------------------------------------------------------------


def passes(engine: Engine) -> bool:
    """Whether a prompt gets the same bits alone, beside another sequence, and with a reused prefix."""
    caps, n_vocab = engine.caps, engine.info.n_vocab
    n = min(caps.n_ctx - 2, caps.align + 6)
    if caps.whole_rows:
        n = min(n, caps.n_row)
    ids = [(7919 * i + 13) % n_vocab for i in range(n + 2)]
    other = caps.n_seq - 1
    if caps.whole_rows:
        want = Want.SCORE if caps.pair else Want.EMBEDDING
        engine.eval([Row(0, ids[:n], 0, want)])
        result = _result(engine, 0)
        row = Row(other, ids[:n], 0, want)
        engine.eval([Row(0, ids[n // 2 :], 0, want), row] if other else [row])
        return result == _result(engine, min(1, other))
    alone = _outputs(engine, 0, ids, n, 0, beside=None)
    kept = engine.truncate(0, engine.exact_prefix(0, n - 1, n))
    again = _outputs(engine, 0, ids, n, kept, beside=None)
    engine.truncate(0, 0)
    company = _outputs(engine, other, ids, n, 0, beside=0 if other else None)
    for seq in {0, other}:
        engine.truncate(seq, 0)
    return alone == again == company


def _result(engine: Engine, row: int) -> bytes | float:
    """The embedding or the score of a whole text."""
    return engine.score(row) if engine.caps.pair else bytes(engine.embedding(row))


def _outputs(
    engine: Engine, seq: int, ids: list[int], n: int, begin: int, *, beside: int | None
) -> list[bytes]:
    """The logits after a prompt of n tokens and after the tokens that follow, as bytes.

    `beside` is a sequence that gets a token in each step.
    """
    caps = engine.caps
    longest = caps.align if beside is None else caps.n_row // caps.align * caps.align
    ends = [*range(begin + longest, n, longest), n]
    rows = [Row(seq, ids[a:b], a) for a, b in zip([begin, *ends], ends, strict=False)]
    rows += [Row(seq, [ids[at]], at) for at in range(n, len(ids))]
    found = []
    for i, row in enumerate(rows):
        engine.eval([row] if beside is None else [Row(beside, [ids[i]], i), row])
        logits = engine.logits(0 if beside is None else 1)
        if row.pos + len(row.tokens) >= n:
            found.append(array("f", logits[0 : engine.info.n_vocab]).tobytes())
    return found


def promised(engine: Engine, load: wire.Load) -> bool:
    """The result of the self-test, from the data directory or by running it."""
    file = Path(load.state_dir) / FILE if load.state_dir else None
    key = _key(engine, load)
    known = _read(file)
    if key in known:
        return known[key]
    result = passes(engine)
    known[key] = result
    if file is not None:
        kept = dict(list(known.items())[-MAX_RESULTS:])
        with contextlib.suppress(UsageError):  # the next load tests again
            datadir.write(file, msgspec.json.format(msgspec.json.encode(kept)))
    return result


def _read(file: Path | None) -> dict[str, bool]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, bool]) if file is not None else {}
    except (OSError, msgspec.MsgspecError, UnicodeError):
        return {}


def _key(engine: Engine, load: wire.Load) -> str:
    """Everything that may change the result."""
    status = Path(load.path).stat()
    try:
        lines = CPUINFO.read_text(errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    names = ("model name", "CPU implementer", "CPU part", "CPU variant")
    cpu = " ".join(line.partition(":")[2].strip() for line in lines if line.startswith(names))
    return (
        f"{load.path} {status.st_size} {status.st_mtime_ns} llama.cpp {engine.info.engine_version} on {cpu} "
        f"threads {engine.n_threads} cache {load.cache_type_k}/{load.cache_type_v} flash {load.flash_attn} "
        f"block {engine.caps.align} slots {engine.caps.n_seq}"
    )
