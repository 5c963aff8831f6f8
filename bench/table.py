"""Helpers of all benchmarks: medians, tables, one streamed chat, and the memory of processes."""

import atexit
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

_home = tempfile.TemporaryDirectory(prefix="tinyoai-bench-")
atexit.register(_home.cleanup)
# benchmarks must not add models to the registry of the user who runs them
os.environ["TINYOAI_HOME"] = _home.name


def median(values: Sequence[float]) -> float:
    """Returns the median: timings are noisy, and a mean follows outliers."""
    return statistics.median(values)


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table in plain text."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}\n")
    for row in [head, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def stream_chat(port: int, body: dict[str, Any]) -> tuple[int, float, float]:
    """Streams one answer. Returns its tokens, the seconds to the first text, and from there to the last event.

    The number of tokens is the server's count, because a token that ends inside a character causes no event. If the
    server sends no count, it is the number of events with text. Without any text, the time to the first is infinite.
    """
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    started = time.perf_counter()
    connection.request(
        "POST",
        "/v1/chat/completions",
        json.dumps({"stream": True, "stream_options": {"include_usage": True}, **body}),
        {"Content-Type": "application/json"},
    )
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(response.read().decode())
    n, n_events, first, last = 0, 0, 0.0, 0.0
    while line := response.readline():
        if not line.startswith(b"data: {"):
            continue
        last = time.perf_counter()
        if b'"content":' in line and b'"content":""' not in line:
            first = first or last
            n_events += 1
        if b'"completion_tokens"' in line:
            n = json.loads(line[len(b"data: ") :])["usage"]["completion_tokens"]
    connection.close()
    return n or n_events, first - started if first else math.inf, last - first


def tree_memory(pid: int) -> float:
    """Returns the resident memory of a process and its children in MB; shared pages count once.

    It is the sum of their proportional set sizes (Pss in smaps_rollup).
    """
    total = 0.0
    for process in [pid, *_children(pid)]:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024 / 1e6
    return total


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *_children(int(child))]
    return found
