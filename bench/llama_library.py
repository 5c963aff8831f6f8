"""Measures the llama.cpp library that TINYOAI_LLAMA_LIBRARY names: prints tokens per second of prefill and decode.

`make llamacpp` runs it with both libraries. The output is one JSON object.
"""

import json
import sys
import time
from collections.abc import Callable

from tinyoai import wire
from tinyoai.engine.contract import Row, Want
from tinyoai.engine.llamacpp.opening import open_engine

N_BATCH = 64
N_DECODED = 32
SECONDS = 3.0
"""For each kind of work; the fastest round counts, since others may use the machine."""


def fastest(work: Callable[[], int]) -> float:
    """Tokens per second of the fastest round. `work` returns its tokens."""
    best, end = 0.0, time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        begin = time.perf_counter()
        n = work()
        best = max(best, n / (time.perf_counter() - begin))
    return best


def main() -> None:
    """Prints the numbers."""
    load = wire.Load(path=sys.argv[1], name="m", engine="llamacpp", n_ctx=512, n_slots=1, n_batch=N_BATCH)
    engine = open_engine(load)
    prompt = [5 + i % 50 for i in range(N_BATCH)]

    def prefill() -> int:
        engine.truncate(0, 0)
        engine.eval([Row(0, prompt, 0, Want.LAST)])
        return N_BATCH

    def decode() -> int:
        engine.truncate(0, N_BATCH)
        for i in range(N_DECODED):
            engine.eval([Row(0, [5 + i], N_BATCH + i, Want.LAST)])
        return N_DECODED

    numbers = {"prefill": fastest(prefill)}
    prefill()
    numbers["decode"] = fastest(decode)
    engine.close()
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
