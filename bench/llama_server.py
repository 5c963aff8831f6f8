"""Measures tinyoai's llamacpp engine beside llama.cpp's own server on the same weights: speed and waiting.

Both servers are up at the same time and their runs alternate, so that a busy minute hits both. The rival is xllamacpp's
server with its defaults, 16 slots and its prompt cache on; its flags are printed. Each stream is a real HTTP connection
in a thread of its own. Medians; a ratio above 1 is in favour of tinyoai.
"""

import argparse
import json
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

from concurrent_streams import measure
from load import RIVAL, healthy
from table import median, show, stream_chat

N_SLOTS = 16


def first_token(port: int, n_words: int, number: int) -> float:
    """Returns the milliseconds to the first token of a prompt that no cache has."""
    words = " ".join(f"{number + i * 7919 % 9973}" for i in range(n_words))
    body = {"model": "m", "max_tokens": 2, "temperature": 0, "messages": [{"role": "user", "content": words}]}
    return stream_chat(port, body)[1] * 1000


def start(command: list[str], port: int) -> "subprocess.Popen[bytes]":
    """Starts a server and returns once it is healthy."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(6000):
        if healthy(port):
            return process
        if process.poll() is not None:
            break
        time.sleep(0.02)
    process.kill()
    raise RuntimeError(f"{command} did not get ready")


def prompt_tokens(port: int, n_words: int) -> int:
    """Returns the number of tokens of the prompts of `first_token`."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    words = " ".join(f"{i * 7919 % 9973}" for i in range(n_words))
    connection.request(
        "POST", "/tokenize", json.dumps({"content": words}), {"Content-Type": "application/json"}
    )
    return len(json.loads(connection.getresponse().read())["tokens"])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--port", type=int, default=18_461)
    parser.add_argument("--flags", default="", help="further flags of tinyoai")
    args = parser.parse_args()
    ports = {"llama-server": args.port, "tinyoai": args.port + 1}
    rival = RIVAL.replace(
        "n_parallel, params.n_gpu_layers = 4, 0", f"n_parallel, params.n_gpu_layers = {N_SLOTS}, 0"
    )
    commands = {
        "llama-server": [sys.executable, "-c", rival, str(args.model), str(ports["llama-server"])],
        "tinyoai": [
            sys.executable, "-m", "tinyoai", "--model", str(args.model), "--model-name", "m", "--engine", "llamacpp",
            "--parallel", str(N_SLOTS), "--port", str(ports["tinyoai"]), *args.flags.split(),
        ],
    }  # fmt: skip
    print(f"rival: xllamacpp.Server, {N_SLOTS} slots, no GPU layers, else its defaults")
    processes = [start(command, ports[name]) for name, command in commands.items()]
    rows: list[list[str]] = []
    try:
        for port in ports.values():
            measure(port, 1, 16)
        for n in args.streams:
            found: dict[str, list[float]] = {name: [] for name in ports}
            for _ in range(args.runs):
                for name, port in ports.items():
                    found[name].append(measure(port, n, args.tokens)[0])
            theirs, ours = median(found["llama-server"]), median(found["tinyoai"])
            rows.append([f"{n} streams, tokens/s", f"{theirs:.0f}", f"{ours:.0f}", f"{ours / theirs:.2f}"])
        waits: dict[str, list[float]] = {name: [] for name in ports}
        for run in range(args.runs):
            for name, port in ports.items():
                waits[name].append(first_token(port, 100, run))
        theirs, ours = median(waits["llama-server"]), median(waits["tinyoai"])
        n = prompt_tokens(ports["tinyoai"], 100)
        rows.append(
            [f"first token after {n} of prompt, ms", f"{theirs:.0f}", f"{ours:.0f}", f"{theirs / ours:.2f}"]
        )
    finally:
        for process in processes:
            process.terminate()
            process.wait()
    show(
        f"beside llama-server, median of {args.runs} runs, {args.model.name}", ["work", *ports, "ratio"], rows
    )


if __name__ == "__main__":
    main()
