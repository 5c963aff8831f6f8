"""Measures the time from process start to a healthy server with a llama.cpp model, beside llama.cpp's own server.

The files are in the page cache. Both choose their slots themselves. llama-server is started from Python, which adds the
import of its package to its time. Goal: 1.3 times the rival's time.
"""

import argparse
import time

from beside import Command, llama_server, tinyoai, wait_ready
from make_model import model
from table import median, show, tree_memory


def load(command: Command) -> tuple[float, float]:
    """Returns the milliseconds until the server is healthy, and the memory in MB at that moment."""
    begin = time.perf_counter()
    server = command.start()
    try:
        wait_ready(server)
        return (time.perf_counter() - begin) * 1000, tree_memory(server.process.pid)
    finally:
        server.stop()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="FILE")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    file = model(args.model)
    commands = (llama_server(file), tinyoai(file))
    found: dict[str, list[tuple[float, float]]] = {command.name: [] for command in commands}
    for _ in range(args.runs + 1):
        for command in commands:
            found[command.name].append(load(command))
    rows, base = [], 0.0
    for name, runs in found.items():
        ms, mb = (median([run[i] for run in runs[1:]]) for i in (0, 1))
        base = base or ms
        rows.append([name, f"{ms:.0f}", f"{ms / base:.2f}", f"{mb:.0f}"])
    head = ["server", "start to /health, ms", "ratio", "memory, MB (Pss)"]
    show(f"load, median of {args.runs} runs, {file.name}", head, rows)


if __name__ == "__main__":
    main()
