"""Measures the time from process start to the first response, and the memory at that moment.

Goal: 250 ms and 50 MB for all processes together. If llama-cpp-python is installed, its server is measured on the
same model.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path

from table import median, show, tree_memory

from tinyoai.app import BUILTIN

BODY = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "Hello!"}]}


def first_answer(command: list[str], port: int) -> tuple[float, float]:
    """Returns the milliseconds until the first chat response, and the memory in MB at that moment."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while time.perf_counter() - started < 60:
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.request(
                    "POST", "/v1/chat/completions", json.dumps(BODY), {"Content-Type": "application/json"}
                )
                response = connection.getresponse()
                response.read()
                if response.status == 200:
                    return (time.perf_counter() - started) * 1000, tree_memory(process.pid)
            except OSError:
                pass
            finally:
                connection.close()
            time.sleep(0.002)
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with {process.returncode}")
        raise RuntimeError(f"{command} never answered")
    finally:
        process.terminate()
        process.wait()


def servers(model: Path) -> dict[str, Callable[[int], list[str]]]:
    """Returns functions by name that make a command line for a port."""
    flags = ["--model", str(model), "--port"]
    found: dict[str, Callable[[int], list[str]]] = {
        "tinyoai": lambda port: [sys.executable, "-m", "tinyoai", "--model-name", "m", *flags, str(port)]
    }
    if importlib.util.find_spec("llama_cpp"):
        found["llama-cpp-python"] = lambda port: [sys.executable, "-m", "llama_cpp.server", *flags, str(port)]
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--port", type=int, default=18_431)
    args = parser.parse_args()
    rows, base = [], (0.0, 0.0)
    for name, command in servers(args.model).items():
        found = [first_answer(command(args.port), args.port) for _ in range(args.runs + 1)][1:]
        ms, mb = median([ms for ms, _ in found]), median([mb for _, mb in found])
        base = base if base[0] else (ms, mb)
        rows.append([name, f"{ms:.0f}", f"{mb:.0f}", f"{ms / base[0]:.2f}", f"{mb / base[1]:.2f}"])
    head = ["server", "first answer, ms", "memory, MB (Pss)", "time ratio", "memory ratio"]
    show(f"start-up, median of {args.runs} runs, {args.model.name}", head, rows)


if __name__ == "__main__":
    main()
