"""Measures the time from process start to a healthy server with a llama.cpp model, beside llama.cpp's own server.

The files are in the page cache. Both serve the whole window of the model in four slots. The rival is xllamacpp's
server, started from Python, which adds the import of that package to its time. Goal: 1.3 times the rival's time.
"""

import argparse
import json
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

from table import median, show, tree_memory

RIVAL = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_parallel, params.n_gpu_layers = 4, 0
server = xllamacpp.Server(params)
sys.stdin.read()
"""


def healthy(port: int) -> bool:
    """Says whether the server is ready to answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        body = json.loads(response.read())
        return response.status == 200 and body.get("status") == "ok"
    except (OSError, ValueError):
        return False
    finally:
        connection.close()


def load(command: list[str], port: int) -> tuple[float, float]:
    """Returns the milliseconds until the server is healthy, and the memory in MB at that moment."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not healthy(port):
            if process.poll() is not None or time.perf_counter() - started > 120:
                raise RuntimeError(f"{command} did not get ready")
            time.sleep(0.002)
        return (time.perf_counter() - started) * 1000, tree_memory(process.pid)
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--port", type=int, default=18_451)
    args = parser.parse_args()
    port = str(args.port)
    commands = {
        "llama-server": [sys.executable, "-c", RIVAL, str(args.model), port],
        "tinyoai": [sys.executable, "-m", "tinyoai", "--model", str(args.model), "--port", port],
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(args.runs + 1):
        for name, command in commands.items():
            found[name].append(load(command, args.port))
    rows, base = [], 0.0
    for name, runs in found.items():
        ms, mb = (median([run[i] for run in runs[1:]]) for i in (0, 1))
        base = base or ms
        rows.append([name, f"{ms:.0f}", f"{ms / base:.2f}", f"{mb:.0f}"])
    head = ["server", "start to /health, ms", "ratio", "memory, MB (Pss)"]
    show(f"load, median of {args.runs} runs, {args.model.name}", head, rows)


if __name__ == "__main__":
    main()
