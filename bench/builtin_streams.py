"""Measures the built-in model with 1, 4 and 16 streams: on both engines of tinyoai, and on llama.cpp's own server.

All servers are up at the same time and their runs alternate. More than 4 streams go to a second llama-server, with 16
slots; its own choice is 4. Goal: the better engine of tinyoai is at least as fast as llama-server.
"""

import argparse
from functools import partial

from beside import alternate, llama_server, running, tinyoai
from concurrent_streams import measure
from llama_server import speed
from make_model import model
from table import show

from tinyoai.app import BUILTIN

ENGINES = ("ctransformers", "llamacpp")
N_SLOTS = 16


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="FILE", nargs="?", default=str(BUILTIN))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--flags", default="", help="further flags of tinyoai")
    args = parser.parse_args()
    file = model(args.model)
    commands = [
        llama_server(file, n_threads=args.threads),
        llama_server(file, n_threads=args.threads, n_slots=N_SLOTS),
    ]
    flags = ("--parallel", str(N_SLOTS), *args.flags.split())
    for engine in ENGINES:
        commands.append(tinyoai(file, "--engine", engine, *flags, name=engine, n_threads=args.threads))
    rows: list[list[str]] = []
    with running(*commands) as (default, wide, *ours):
        for server in (default, wide, *ours):
            measure(server.port, 1, 16)
        for n in args.streams:
            servers = [wide if n > 4 else default, *ours]
            found = alternate(args.runs, {s.name: partial(speed, s.port, n, args.tokens) for s in servers})
            theirs, best = found["llama-server"], max(found[engine] for engine in ENGINES)
            row = [f"{n} streams", f"{theirs:.0f}", *(f"{found[engine]:.0f}" for engine in ENGINES)]
            rows.append([*row, f"{best / theirs:.2f}"])
    head = ["tokens/s", "llama-server", *ENGINES, "the better / llama-server"]
    show(f"streams, median of {args.runs} runs of {args.tokens} tokens, {file.name}", head, rows)


if __name__ == "__main__":
    main()
