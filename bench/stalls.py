"""Measures the pauses of four streams while a long prompt arrives, and how fast that prompt is evaluated meanwhile.

FILE is a model, or 110m for a generated one. Both servers have 8 slots. A chunk is the time of 64 prompt tokens when
nothing else runs: the time to the first token of such a prompt, divided by its length. Goals: no stream pauses longer
than 1.5 chunks, and the prompt is evaluated at 0.45 of its speed alone at least.
"""

import argparse
import threading
import time
from http.client import HTTPConnection
from itertools import pairwise
from typing import NamedTuple

from beside import llama_server, running, text_of, tinyoai
from make_model import model
from table import median, show, stream

N_SLOTS = 8
CHUNK = 64


class Found(NamedTuple):
    """One run: seconds."""

    alone: float
    """To the first token of the prompt while nothing else runs."""
    beside: float
    """The same while the streams decode."""
    pause: float
    """The longest one of a stream meanwhile."""
    pause_before: float
    """The longest one of a stream before the prompt arrives."""


class Streams:
    """Answers that are streamed until `stop`."""

    def __init__(self, port: int, n: int) -> None:
        self._port = port
        self.times: list[list[float]] = [[] for _ in range(n)]
        """Of the pieces of each stream."""
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._stream, args=(i,)) for i in range(n)]
        for thread in self._threads:
            thread.start()

    def _stream(self, number: int) -> None:
        def on_text(connection: HTTPConnection) -> None:
            self.times[number].append(time.perf_counter())
            if self._stopped.is_set():
                connection.close()

        body = {"max_tokens": 100_000, "ignore_eos": True, "temperature": 0.8, "seed": number}
        message = {"role": "user", "content": f"Tell me a story about {number} cats."}
        stream(self._port, {**body, "messages": [message]}, on_text=on_text)

    def wait(self, n_pieces: int) -> None:
        """Waits until each stream has so many pieces more than now."""
        wanted = [len(times) + n_pieces for times in self.times]
        while any(len(times) < n for times, n in zip(self.times, wanted, strict=True)):
            if not all(thread.is_alive() for thread in self._threads):
                raise RuntimeError("a stream ended too early; choose a shorter prompt")
            time.sleep(0.005)

    def stop(self) -> None:
        """Ends all streams."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def longest_pause(self, begin: float, end: float) -> float:
        """Returns the longest time without a piece in any stream between two moments."""
        longest = 0.0
        for times in self.times:
            inside = [begin, *(at for at in times if begin < at < end), end]
            longest = max(longest, *(after - before for before, after in pairwise(inside)))
        return longest


def measure(port: int, n_streams: int, n_tokens: int, run: int) -> Found:
    """Evaluates one long prompt alone, and another one beside the streams."""

    def prompt(text: str) -> tuple[float, float]:
        """When the prompt was sent, and the seconds to its first token."""
        messages = [{"role": "user", "content": text}]
        found = stream(port, {"max_tokens": 1, "temperature": 0, "ignore_eos": True, "messages": messages})
        return found.begin, found.first

    first, second = (text_of(port, n_tokens, 2 * run + i) for i in range(2))
    _, alone = prompt(first)
    streams = Streams(port, n_streams)
    try:
        streams.wait(8)
        settled = time.perf_counter()
        streams.wait(16)
        sent, beside = prompt(second)
        streams.wait(4)
    finally:
        streams.stop()
    return Found(
        alone, beside, streams.longest_pause(sent, sent + beside), streams.longest_pause(settled, sent)
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="FILE")
    parser.add_argument("--prompt", type=int, default=1500, help="tokens of the prompt that arrives")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--flags", default="", help="further flags of tinyoai")
    args = parser.parse_args()
    file = model(args.model)
    flags = ("--engine", "llamacpp", "--parallel", str(N_SLOTS), "--kv", "separate", *args.flags.split())
    commands = (
        llama_server(file, n_threads=args.threads, n_slots=N_SLOTS, unified=True),
        tinyoai(file, *flags, n_threads=args.threads),
    )
    found: dict[str, list[Found]] = {command.name: [] for command in commands}
    with running(*commands) as servers:
        for server in servers:
            measure(server.port, 1, CHUNK, 1_000_000)  # the first requests of a server are slower
        for run in range(args.runs):
            for server in servers:
                found[server.name].append(measure(server.port, args.streams, args.prompt, run))
    rows = []
    for name, runs in found.items():
        chunks = [CHUNK * run.alone / args.prompt for run in runs]
        cells = [
            f"{1000 * median(chunks):.0f}",
            f"{1000 * median([run.pause_before for run in runs]):.0f}",
            f"{1000 * median([run.pause for run in runs]):.0f}",
            f"{median([run.pause / chunk for run, chunk in zip(runs, chunks, strict=True)]):.2f}",
            f"{args.prompt / median([run.alone for run in runs]):.0f}",
            f"{args.prompt / median([run.beside for run in runs]):.0f}",
            f"{median([run.alone / run.beside for run in runs]):.2f}",
        ]
        rows.append([name, *cells])
    head = ["server", "chunk, ms", "pause before, ms", "pause, ms", "in chunks"]
    head += ["alone, tokens/s", "beside, tokens/s", "ratio"]
    title = (
        f"a prompt of {args.prompt} beside {args.streams} streams, median of {args.runs} runs, {file.name}"
    )
    show(title, head, rows)


if __name__ == "__main__":
    main()
