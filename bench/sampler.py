"""Measures the time to choose one token, compared with llama.cpp's chain of samplers on the same logits.

Both are C functions called through cffi, with the same logits in turn; each call is timed, and the figures are medians
over the calls. The chain is that of llama.cpp's server: penalties, top_k, top_p, min_p, temperature, draw. It
changes its array of candidates, so each token needs a new one; a copy of ready candidates makes it here, faster than
the server's own loop. One ratio includes this copy and one leaves it out. Log-probabilities
cost llama.cpp's server a second array, a softmax and a partial sort, and so they do here.

The logits are like those of a model: a bell of deviation 4 with ten tokens far above it. With --model they are those
of a real one, and tokens drawn from its bulk fill up a larger vocabulary. Flat ones, with deviation 1, are the worst
case: half of the vocabulary are candidates of top_p.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cffi import FFI
from numpy.typing import NDArray
from table import median, show

from tinyoai import wire
from tinyoai.engine.contract import Row, Want
from tinyoai.engine.llamacpp.library import find
from tinyoai.engine.llamacpp.opening import open_engine
from tinyoai.native import Sampler
from tinyoai.sampling import Sampling

Logits = NDArray[np.float32]
Timed = Callable[[], tuple[float, float]]
"""Chooses a token. Returns the seconds that it took, and those before it to fill the candidates."""

VOCABULARIES = [49_152, 128_256, 151_936, 262_144]
N_VECTORS = 4
"""Vectors of logits that the calls take in turn, so that no sampler finds its input in the innermost cache."""
TEXT = "Once upon a time there was a cat who lived in a small house by the sea. One morning she said:"

DECLARATIONS = """
typedef struct llama_sampler llama_sampler;
typedef struct { int32_t id; float logit; float p; } llama_token_data;
typedef struct { llama_token_data *data; size_t size; int64_t selected; bool sorted; } llama_token_data_array;
typedef struct { bool no_perf; } llama_sampler_chain_params;
llama_sampler *llama_sampler_chain_init(llama_sampler_chain_params params);
void llama_sampler_chain_add(llama_sampler *chain, llama_sampler *smpl);
llama_sampler *llama_sampler_init_greedy(void);
llama_sampler *llama_sampler_init_dist(uint32_t seed);
llama_sampler *llama_sampler_init_top_k(int32_t k);
llama_sampler *llama_sampler_init_top_p(float p, size_t min_keep);
llama_sampler *llama_sampler_init_min_p(float p, size_t min_keep);
llama_sampler *llama_sampler_init_temp(float t);
llama_sampler *llama_sampler_init_penalties(int32_t n_vocab, int32_t last_n, float repeat, float freq, float present);
void llama_sampler_accept(llama_sampler *smpl, int32_t token);
void llama_sampler_apply(llama_sampler *smpl, llama_token_data_array *cur_p);
void llama_sampler_free(llama_sampler *smpl);
"""


class Case(NamedTuple):
    """What a request asks for."""

    name: str
    sampling: Sampling
    top_logprobs: int = -1


CASES = [
    Case("greedy", Sampling(temperature=0)),
    Case("top_p 0.95", Sampling(temperature=0.8, top_p=0.95, seed=1)),
    Case("top_p, repeat", Sampling(temperature=0.8, top_p=0.95, repeat_penalty=1.1, seed=1)),
    Case("top_p, 5 logprobs", Sampling(temperature=0.8, top_p=0.95, seed=1), 5),
    Case("min_p 0.05", Sampling(temperature=0.8, min_p=0.05, seed=1)),
    Case("no filter", Sampling(temperature=0.8, seed=1)),
    Case("top_k 1000", Sampling(temperature=0.8, top_k=1000, top_p=0.95, seed=1)),
    Case("top_k 40, top_p", Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=1)),
    Case("top_k, top_p, repeat", Sampling(temperature=0.8, top_k=40, top_p=0.95, repeat_penalty=1.1, seed=1)),
]


# -- logits ---------------------------------------------------------------------------------------------


def like_a_model(n_vocab: int, random: np.random.Generator) -> Logits:
    """Returns a bell and ten tokens far above it."""
    x = random.normal(size=n_vocab) * 4
    x[random.choice(n_vocab, 10, replace=False)] = random.uniform(17, 23, 10)
    return x.astype(np.float32)


def of_a_model(path: Path) -> list[Logits]:
    """Returns the logits of a model after each of the last tokens of a text."""
    engine = open_engine(wire.Load(path=str(path), name="m", engine="llamacpp", n_ctx=512, n_slots=1))
    ids, found = engine.encode([wire.Text(TEXT)]), []
    for i, token in enumerate(ids):
        engine.eval([Row(0, [token], i, Want.LAST)])
        found.append(
            np.frombuffer(FFI().buffer(engine.logits(0), 4 * engine.info.n_vocab), np.float32).copy()
        )
    engine.close()
    return found[-N_VECTORS:]


def resized(x: Logits, n_vocab: int, random: np.random.Generator) -> Logits:
    """Returns the first logits, and as many more as are missing: the bulk of `x` with noise."""
    if n_vocab <= len(x):
        return x[:n_vocab].copy()
    bulk = x[x < np.quantile(x, 0.99)]
    more = random.choice(bulk, n_vocab - len(x)) + random.normal(size=n_vocab - len(x)) / 4
    return np.concatenate([x, more.astype(np.float32)])


# -- the samplers -----------------------------------------------------------------------------------------


def ours(vectors: list[Logits], case: Case, history: list[int]) -> Timed:
    """Returns one C call on a pointer, as the worker makes it."""
    sampler = Sampler(len(vectors[0]), case.sampling, n_ctx=4096, top_logprobs=case.top_logprobs)
    sampler.accept_prompt(history)
    pointers = cycle([FFI().cast("float *", x.ctypes.data) for x in vectors])

    def draw() -> tuple[float, float]:
        pointer = next(pointers)
        started = time.perf_counter()
        sampler.sample(pointer)
        return time.perf_counter() - started, 0.0

    return draw


class Chain:
    """Some of llama.cpp's samplers and an array of candidates."""

    def __init__(self, ffi: FFI, lib: Any, parts: list[Any], n_vocab: int) -> None:
        self._lib = lib
        self._chain = lib.llama_sampler_chain_init(
            ffi.new("llama_sampler_chain_params *", {"no_perf": True})[0]
        )
        for part in parts:
            lib.llama_sampler_chain_add(self._chain, part)
        self._memory = np.zeros(3 * n_vocab, np.int32)
        self._array = ffi.new("llama_token_data_array *")
        self._data = ffi.cast("llama_token_data *", self._memory.ctypes.data)

    def fill(self, candidates: NDArray[np.int32]) -> None:
        """Starts over with these."""
        self._memory[:] = candidates
        array = self._array
        array.data, array.size, array.selected, array.sorted = self._data, len(candidates) // 3, -1, False

    def apply(self) -> Any:
        """Runs the chain. Returns the array."""
        self._lib.llama_sampler_apply(self._chain, self._array)
        return self._array

    def accept(self, token: int) -> None:
        """Adds a token to the history."""
        self._lib.llama_sampler_accept(self._chain, token)


def llama_cpp(ffi: FFI, lib: Any, vectors: list[Logits], case: Case, history: list[int]) -> Timed:
    """Returns the chain of llama.cpp's server for a case, applied to candidates that are copied for each token."""
    n_vocab, want = len(vectors[0]), case.sampling
    parts = []
    if want.repeat_penalty != 1:
        parts.append(
            lib.llama_sampler_init_penalties(n_vocab, want.repeat_last_n, want.repeat_penalty, 0.0, 0.0)
        )
    if want.top_k > 0:
        parts.append(lib.llama_sampler_init_top_k(want.top_k))
    if want.top_p < 1:
        parts.append(lib.llama_sampler_init_top_p(want.top_p, 1))
    if want.min_p > 0:
        parts.append(lib.llama_sampler_init_min_p(want.min_p, 1))
    if want.temperature > 0:
        parts += [lib.llama_sampler_init_temp(want.temperature), lib.llama_sampler_init_dist(1)]
    else:
        parts.append(lib.llama_sampler_init_greedy())
    chain, logprobs = Chain(ffi, lib, parts, n_vocab), None
    if case.top_logprobs >= 0:
        best = [lib.llama_sampler_init_dist(1), lib.llama_sampler_init_top_k(case.top_logprobs)]
        logprobs = Chain(ffi, lib, best, n_vocab)
    for token in history:
        chain.accept(token)
    layout = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    candidates = []
    for x in vectors:
        ready = np.zeros(n_vocab, layout)
        ready["id"], ready["logit"] = np.arange(n_vocab), x
        candidates.append(ready.view(np.int32))
    turns = cycle(candidates)

    def draw() -> tuple[float, float]:
        ready = next(turns)
        started = time.perf_counter()
        chain.fill(ready)
        if logprobs:
            logprobs.fill(ready)
        filled = time.perf_counter()
        array = chain.apply()
        chain.accept(array.data[array.selected].id)
        if logprobs:
            logprobs.apply()
        return time.perf_counter() - filled, filled - started

    return draw


# -- measuring --------------------------------------------------------------------------------------------


def measure(draws: list[Timed], seconds: float, middle: Callable[[list[float]], float]) -> list[list[float]]:
    """Returns for each sampler the seconds of a draw and of filling before it. The samplers take turns."""
    found: list[list[tuple[float, float]]] = [[] for _ in draws]
    ends = [0.0] * len(draws)
    for _ in range(5):
        for i, draw in enumerate(draws):
            draw()
            ends[i] = time.perf_counter() + seconds / 5
            n = 0
            while n < 4 or time.perf_counter() < ends[i]:
                found[i].append(draw())
                n += 1
    return [[middle(list(column)) for column in zip(*times, strict=True)] for times in found]


def kinds(model: Path | None) -> Iterator[tuple[str, Callable[[int, np.random.Generator], list[Logits]]]]:
    """Yields the kinds of logits: a name, and a function that makes vectors of a size."""
    if model:
        real = of_a_model(model)
        yield "model", lambda n, random: [resized(x, n, random) for x in real]
    else:
        yield "like a model", lambda n, random: [like_a_model(n, random) for _ in range(N_VECTORS)]
    yield "flat", lambda n, random: [random.normal(size=n).astype(np.float32) for _ in range(N_VECTORS)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--model", type=Path, help="GGUF file of a model whose logits to take")
    parser.add_argument("--cases", nargs="+", default=[], help="only these; see the table for their names")
    parser.add_argument("--seconds", type=float, default=0.25, help="for each sampler and row")
    parser.add_argument("--fastest", action="store_true", help="minima instead of medians, on a busy machine")
    args = parser.parse_args()
    library = find()
    if library is None:
        raise SystemExit("llama.cpp is not installed: pip install -e '.[llamacpp]'")
    ffi = FFI()
    ffi.cdef(DECLARATIONS)
    lib = ffi.dlopen(str(library.path))
    middle = min if args.fastest else median
    rows = []
    for kind, make in kinds(args.model):
        for case in CASES:
            if args.cases and case.name not in args.cases:
                continue
            for n_vocab in args.vocabularies:
                random = np.random.default_rng(n_vocab)
                vectors, history = make(n_vocab, random), random.integers(3, n_vocab, 200).tolist()
                draws = [ours(vectors, case, history), llama_cpp(ffi, lib, vectors, case, history)]
                (mine, _), (theirs, filling) = measure(draws, args.seconds, middle)
                rows.append(
                    [
                        kind,
                        case.name,
                        f"{n_vocab:,}",
                        f"{mine * 1e6:,.1f}",
                        f"{mine / n_vocab * 1e9:.2f}",
                        f"{(theirs + filling) * 1e6:,.0f}",
                        f"{(theirs + filling) / mine:.1f}",
                        f"{theirs / mine:.1f}",
                    ]
                )
    head = ["logits", "case", "vocabulary", "µs", "ns/entry", "llama.cpp µs", "ratio", "without filling"]
    title = f"sampling one token, {'fastest' if args.fastest else 'median'} of many calls, {library.title}"
    show(title, head, rows)


if __name__ == "__main__":
    main()
