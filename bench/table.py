"""Helpers of all benchmarks: medians, tables, one streamed chat, and the memory of processes."""

import atexit
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

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


class Streamed(NamedTuple):
    """A streamed answer. Times are of time.perf_counter."""

    begin: float
    """The request was sent."""
    times: list[float]
    """Events with text."""
    end: float
    """The last event; 0 without any."""
    n_tokens: int
    """The server's count, because a token that ends inside a character causes no event; else that of the events."""
    n_cached: int
    """Prompt tokens that the server did not evaluate again, as it says."""
    text: str

    @property
    def first(self) -> float:
        """Seconds to the first text; infinite without any."""
        return self.times[0] - self.begin if self.times else math.inf


def stream(
    port: int,
    body: dict[str, Any],
    *,
    path: str = "/v1/chat/completions",
    on_text: Callable[[HTTPConnection], None] | None = None,
) -> Streamed:
    """Streams one answer. `on_text` is called after each event with text, and may close the connection."""
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    begin = time.perf_counter()
    connection.request(
        "POST",
        path,
        json.dumps({"model": "m", "stream": True, "stream_options": {"include_usage": True}, **body}),
        {"Content-Type": "application/json"},
    )
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(response.read().decode())
    # parsed afterwards: the client takes a core from the servers
    lines: list[tuple[float, bytes]] = []
    while connection.sock is not None and (line := response.readline()):
        if line.startswith(b"data: {"):
            lines.append((time.perf_counter(), line))
            if on_text is not None and _text(json.loads(line[len(b"data: ") :])):
                on_text(connection)
    connection.close()
    events = [(at, json.loads(line[len(b"data: ") :])) for at, line in lines]
    times = [at for at, event in events if _text(event)]
    usage: dict[str, Any] = next((event["usage"] for _, event in reversed(events) if event.get("usage")), {})
    return Streamed(
        begin,
        times,
        lines[-1][0] if lines else 0.0,
        usage.get("completion_tokens") or len(times),
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        "".join(_text(event) for _, event in events),
    )


def _text(event: dict[str, Any]) -> str:
    choice = (event.get("choices") or [{}])[0]
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


def stream_chat(port: int, body: dict[str, Any]) -> tuple[int, float, float]:
    """Streams one answer. Returns its tokens, the seconds to the first text, and from there to the last event."""
    found = stream(port, body)
    return found.n_tokens, found.first, found.end - found.times[0] if found.times else 0.0


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
