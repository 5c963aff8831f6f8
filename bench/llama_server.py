"""Measures tinyoai's llamacpp engine beside llama.cpp's own server on the same weights: speed and waiting.

FILE is a model, or 110m for a generated one. tinyoai runs twice, with a unified KV cache and with separate ones. All
servers are up at the same time and their runs alternate. More than 4 streams go to a second llama-server, with 16
slots; its own choice is 4. Each stream is a real HTTP connection in a thread of its own. A ratio above 1 is in favour
of tinyoai. Goals: 1.1, 1.05 and 1.1 times the speed with 1, 4 and 16 streams; 0.95 for the first token.
"""

import argparse
from functools import partial

from beside import Command, alternate, count_tokens, llama_server, running, text_of, tinyoai
from concurrent_streams import measure
from make_model import model
from table import show, stream

KINDS = ("unified", "separate")
N_SLOTS = 16


def speed(port: int, n_streams: int, n_tokens: int, run: int) -> float:
    """Returns the tokens per second of all streams together."""
    return measure(port, n_streams, n_tokens)[0]


def first_token(port: int, n_tokens: int, run: int) -> float:
    """Returns the milliseconds to the first token of a prompt that no cache has."""
    messages = [{"role": "user", "content": text_of(port, n_tokens, 1000 + run)}]
    return 1000 * stream(port, {"max_tokens": 2, "temperature": 0, "messages": messages}).first


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="FILE")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=400, help="tokens of the prompt before the first token")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--flags", default="", help="further flags of tinyoai")
    args = parser.parse_args()
    file = model(args.model)
    commands: list[Command] = [llama_server(file, n_threads=args.threads)]
    if max(args.streams) > 4:
        commands.append(llama_server(file, n_threads=args.threads, n_slots=N_SLOTS))
    flags = ("--engine", "llamacpp", "--parallel", str(N_SLOTS), *args.flags.split())
    commands += [
        tinyoai(file, "--kv", kind, *flags, name=f"tinyoai {kind}", n_threads=args.threads) for kind in KINDS
    ]
    rows: list[list[str]] = []
    with running(*commands) as servers:
        theirs, ours = servers[:-2], servers[-2:]

        def compare(work: str, found: dict[str, float], *, less: bool = False) -> None:
            base = found["llama-server"]
            ratios = [found[s.name] / base for s in ours]
            row = [work, f"{base:.0f}", *(f"{found[s.name]:.0f}" for s in ours)]
            rows.append([*row, *(f"{1 / ratio if less else ratio:.2f}" for ratio in ratios)])

        for server in servers:
            measure(server.port, 1, 16)
        for n in args.streams:
            pairs = [theirs[n > 4], *ours]
            found = alternate(args.runs, {s.name: partial(speed, s.port, n, args.tokens) for s in pairs})
            compare(f"{n} streams, tokens/s", found)
        found = alternate(
            args.runs, {s.name: partial(first_token, s.port, args.prompt) for s in [theirs[0], *ours]}
        )
        n_prompt = count_tokens(ours[0].port, text_of(ours[0].port, args.prompt, 1000))
        compare(f"first token after {n_prompt} of prompt, ms", found, less=True)
    head = ["work", "llama-server", *KINDS, *(f"ratio {kind}" for kind in KINDS)]
    show(f"beside llama-server, median of {args.runs} runs, {file.name}", head, rows)


if __name__ == "__main__":
    main()
