"""How much of the engine's speed is left after scheduling, sampling, JSON, SSE and HTTP?

Tokens a second of one stream through HTTP beside the bare loop in the same run: ctransformers' own
Python class evaluating and sampling one token after the other, as its users would. Aim: at least 75 %
on the built-in model and 97 % on a generated one of 110 million parameters (--model, see tests/models).
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from concurrent_streams import wait
from startup import servers
from table import median, show, stream_chat

from tinyoai.app import BUILTIN

PROMPT = "Tell me a story about a cat."


def bare(model: Path, n_tokens: int) -> float:
    """Tokens a second of the library's own loop: eval one token, sample one token."""
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
    """Tokens a second of one stream, from its first to its last event."""
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
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--port", type=int, default=18_433)
    args = parser.parse_args()
    if not __debug__:
        sys.exit("run it as users do, without -O")
    command = [*servers(args.model)["tinyoai"](args.port), "--parallel", "1", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    pairs = []
    try:
        wait(args.port)
        served(args.port, 50)
        for _ in range(args.runs):
            pairs.append((bare(args.model, args.tokens), served(args.port, args.tokens)))
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
        f"decode, median of {args.runs} runs of {args.tokens} tokens, {args.model.name}",
        ["", "tokens/s", "ratio"],
        rows,
    )


if __name__ == "__main__":
    main()
