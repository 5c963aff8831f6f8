"""Shared by all benchmarks: running a server, medians, and one table.

Prints tables and measures the memory of processes.
"""

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
# what is measured here must not stay in the registry of the person who measures
os.environ["TINYOAI_HOME"] = _home.name


def median(values: Sequence[float]) -> float:
    """The middle one: machines are noisy, and a mean would follow the noise."""
    return statistics.median(values)


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table in plain text."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}\n")
    for row in [head, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def stream_chat(port: int, body: dict[str, Any]) -> tuple[int, float, float]:
    """One streamed chat answer: its tokens, seconds to the first text, seconds from there to the last event.

    Tokens are what the server counts, since one that ends in the middle of a character makes no event; its
    events with text where it does not count. A stream that was broken off before any has an infinite first.
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
    """Resident memory of a process and its children in MB, pages that they share counted once each.

    The sum of proportional set sizes (Pss in smaps_rollup), as the kernel counts it.
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
