"""Measures total tokens per second and the time to the first token with 1, 4 and 16 concurrent streams.

Every stream is a real HTTP connection in a thread of its own. If llama-cpp-python is installed, its server is
measured too; there a new request interrupts the running one.
"""

import argparse
import subprocess
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

from startup import servers
from table import median, show, stream_chat

from tinyoai.app import BUILTIN


def wait(port: int) -> None:
    """Waits until the server answers."""
    for _ in range(3000):
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", "/v1/models")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.02)
        finally:
            connection.close()
    raise RuntimeError("the server never answered")


def measure(port: int, n_streams: int, n_tokens: int) -> tuple[float, float]:
    """Returns tokens per second over all streams and the median time to the first token in milliseconds."""
    counts, firsts = [], []

    def one(number: int) -> None:
        body = {
            "model": "m",
            "max_tokens": n_tokens,
            "temperature": 0.8,
            "seed": number,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": f"Tell me a story about {number} cats."}],
        }
        n, first, _ = stream_chat(port, body)
        counts.append(n)
        firsts.append(first)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n_streams)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started), median(firsts) * 1000


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--port", type=int, default=18_432)
    args = parser.parse_args()
    rows = []
    base: dict[int, float] = {}
    for name, command in servers(args.model).items():
        extra = ["--parallel", str(args.parallel)] if name == "tinyoai" else []
        process = subprocess.Popen(
            [*command(args.port), *extra], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait(args.port)
            measure(args.port, 1, 20)
            for n in args.streams:
                found = [measure(args.port, n, args.tokens) for _ in range(args.runs)]
                rate, first = median([r for r, _ in found]), median([f for _, f in found])
                base.setdefault(n, rate)
                rows.append([name, str(n), f"{rate:.0f}", f"{first:.0f}", f"{rate / base[n]:.2f}"])
        finally:
            process.terminate()
            process.wait()
    head = ["server", "streams", "tokens/s, total", "first token, ms", "ratio"]
    show(f"concurrent streams, median of {args.runs} runs, {args.model.name}", head, rows)


if __name__ == "__main__":
    main()
