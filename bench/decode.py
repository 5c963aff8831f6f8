"""Measures the share of the engine's speed that remains after scheduling, sampling, JSON, SSE and HTTP.

Compares tokens per second of one HTTP stream with a bare loop in the same run: ctransformers' own Python class
evaluates and samples one token after the other. Goal: at least 75 % on the built-in model and 97 % on a generated
model of 110 million parameters (--model 110m, see make_model.py).
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from concurrent_streams import wait
from make_model import model
from startup import servers
from table import median, show, stream_chat

from tinyoai.app import BUILTIN

PROMPT = "Tell me a story about a cat."


def bare(model: Path, n_tokens: int) -> float:
    """Returns tokens per second of the library's own loop, which evaluates and samples one token at a time."""
    from ctransformers import LLM, Config

    llm = LLM(str(model), model_type="llama", config=Config(context_length=1024, threads=1))
    llm.eval(llm.tokenize(PROMPT))
    started = time.perf_counter()
    for _ in range(n_tokens):
        token = llm.sample(top_k=40, top_p=0.95, temperature=0.8, repetition_penalty=1.0, last_n_tokens=0)
        llm.detokenize([token])
        llm.eval([token])
    return n_tokens / (time.perf_counter() - started)


def served(port: int, n_tokens: int) -> float:
    """Returns tokens per second of one stream, from its first to its last event."""
    body = {
        "model": "m",
        "max_tokens": n_tokens,
        "ignore_eos": True,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "messages": [{"role": "user", "content": PROMPT}],
    }
    n, _, seconds = stream_chat(port, body)
    return (n - 1) / seconds


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(BUILTIN))
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--port", type=int, default=18_433)
    args = parser.parse_args()
    file = model(args.model)
    if not __debug__:
        sys.exit("run it without -O, as users run the server")
    command = [*servers(file)["tinyoai"](args.port), "--parallel", "1", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    pairs = []
    try:
        wait(args.port)
        served(args.port, 50)
        for _ in range(args.runs):
            pairs.append((bare(file, args.tokens), served(args.port, args.tokens)))
    finally:
        process.terminate()
        process.wait()
    rows = [
        ["bare ctransformers loop", f"{median([b for b, _ in pairs]):.0f}", "1.00"],
        [
            "tinyoai, HTTP stream",
            f"{median([s for _, s in pairs]):.0f}",
            f"{median([s / b for b, s in pairs]):.2f}",
        ],
    ]
    show(
        f"decode, median of {args.runs} runs of {args.tokens} tokens, {file.name}",
        ["", "tokens/s", "ratio"],
        rows,
    )


if __name__ == "__main__":
    main()
