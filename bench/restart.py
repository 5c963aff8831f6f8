"""Measures the first answer on a long conversation after a restart of the server, beside a prefill without any cache.

FILE is a model, or 110m for a generated one. A server answers a conversation, is stopped as a user stops it, and
started again with the same data directory. Then the conversation goes on. The time from the start of the process to
the first token counts, the load included. "Prefill" is the time to the first token on a loaded server that has never
seen the conversation. Goal: a tenth of it.
"""

import argparse
import tempfile
import time
from typing import NamedTuple

from beside import Command, llama_server, text_of, tinyoai, wait_ready
from make_model import model
from table import median, show, stream


class Times(NamedTuple):
    """Seconds of one server."""

    prefill: float
    load: float
    restart: float
    n_cached: int


def measure(command: Command, conversation: str, question: str, idle_s: float) -> Times:
    """Runs a server twice with one data directory, which is new."""
    with tempfile.TemporaryDirectory(prefix="tinyoai-bench-") as home:
        server = command.start(home)
        try:
            wait_ready(server)
            stream(server.port, {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4})
            messages = [{"role": "user", "content": conversation}]
            found = stream(
                server.port, {"messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            )
            time.sleep(idle_s)
        finally:
            server.stop()
        messages += [{"role": "assistant", "content": found.text}, {"role": "user", "content": question}]
        begin = time.perf_counter()
        server = command.start(home)
        try:
            wait_ready(server)
            loaded = time.perf_counter()
            again = stream(
                server.port, {"messages": messages, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
            )
        finally:
            server.stop()
        return Times(found.first, loaded - begin, again.begin + again.first - begin, again.n_cached)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="FILE")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of the conversation")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--idle", type=float, default=2.0, help="seconds between the answer and the stop")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--flags", default="", help="further flags of tinyoai")
    args = parser.parse_args()
    file = model(args.model)
    flags = ("--engine", "llamacpp", *args.flags.split())
    commands = (llama_server(file, n_threads=args.threads), tinyoai(file, *flags, n_threads=args.threads))
    server = commands[1].start()
    try:
        wait_ready(server)
        texts = [text_of(server.port, args.tokens, run) for run in range(args.runs)]
        question = text_of(server.port, 20, 1000)
    finally:
        server.stop()
    found: dict[str, list[Times]] = {command.name: [] for command in commands}
    for run in range(args.runs):
        for command in commands:
            if run == 0:
                print(f"{command.name}: {command.flags or 'defaults'}", flush=True)
            found[command.name].append(measure(command, texts[run], question, args.idle))
    rows = []
    for name, runs in found.items():
        prefill, load, restart, n_cached = (median(values) for values in zip(*runs, strict=True))
        rows.append(
            [name, *(f"{s:.2f}" for s in (prefill, load, restart, restart / prefill)), f"{n_cached:.0f}"]
        )
    head = ["server", "prefill, s", "load, s", "start to first token, s", "of a prefill", "cached tokens"]
    show(f"{args.tokens} tokens, median of {args.runs} runs, {file.name}", head, rows)


if __name__ == "__main__":
    main()
