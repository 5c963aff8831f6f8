"""Measures the cost of HTTP: requests per second, and CPU time for each streamed token.

Only the server process is measured, by the run time that the kernel records. The worker runs the scripted engine,
and a separate client process keeps 1 to 1,000 connections busy. If the extra `bench` is installed, the same run
measures uvicorn with FastAPI and sse-starlette, which stream the same events without a worker process. Goal: at
least 3 times their tokens per CPU second, at a cost that does not grow with idle connections.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import multiprocessing
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import uvloop
from concurrent_streams import wait
from table import median, show


def request(n_tokens: int, *, stream: bool) -> bytes:
    """Returns the bytes of one chat request."""
    script = json.dumps({"text": "x", "repeat": n_tokens})
    body = json.dumps(
        {
            "model": "fake",
            "max_tokens": n_tokens,
            "temperature": 0,
            "stream": stream,
            "messages": [{"role": "user", "content": "!" + script}],
        }
    ).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


class Client(asyncio.Protocol):
    """A connection that sends the next request as soon as it has the response."""

    def __init__(self, ask: bytes, n_times: int, done: "asyncio.Future[None]") -> None:
        self._ask, self._left, self._done = ask, n_times, done
        self._tail = b""
        self._whole = b""
        self._missing = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._ask)

    def data_received(self, data: bytes) -> None:
        if self._missing < 0 and not self._tail:
            # the head tells where the body ends: after the last chunk, or after Content-Length bytes
            self._whole += data
            head, found, rest = self._whole.partition(b"\r\n\r\n")
            if not found:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(self._whole.decode())
            self._whole, data = b"", rest
            lower = head.lower()
            if b"content-length:" in lower:
                self._missing = int(lower.partition(b"content-length:")[2].split(b"\r\n")[0])
            else:
                self._tail = b" "
        if self._missing >= 0:
            self._missing -= len(data)
            ended = self._missing == 0
        else:
            self._tail = (self._tail + data)[-7:]
            ended = self._tail.endswith(b"\r\n0\r\n\r\n")
        if ended:
            self._tail, self._missing = b"", -1
            self._left -= 1
            if self._left:
                self._transport.write(self._ask)
            else:
                self._transport.close()
                self._done.set_result(None)


def load(port: int, ask: bytes, n_connections: int, n_times: int) -> None:
    """Sends n_times requests on each connection, in a client process."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        waiting = []
        for _ in range(n_connections):
            done = loop.create_future()
            waiting.append(done)
            await loop.create_connection(lambda done=done: Client(ask, n_times, done), "127.0.0.1", port)
        await asyncio.gather(*waiting)

    uvloop.run(main())


def cpu(pid: int) -> float:
    """Returns the run time of all threads of a process in seconds."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def measure(pid: int, port: int, ask: bytes, n_connections: int, n_times: int) -> tuple[float, float]:
    """Returns wall time and the server's CPU time for all responses, in seconds."""
    client = multiprocessing.get_context("spawn").Process(
        target=load, args=(port, ask, n_connections, n_times)
    )
    before, started = cpu(pid), time.perf_counter()
    client.start()
    client.join()
    if client.exitcode:
        sys.exit("the client failed")
    return time.perf_counter() - started, cpu(pid) - before


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[int]:
    """Runs a server and yields its process id."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait(port)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def servers(port: int) -> dict[str, list[str]]:
    """Returns command lines by name: tinyoai, and FastAPI if it is installed."""
    tiny = [
        sys.executable, "-m", "tinyoai", "--engine", "fake", "--model-name", "fake", "--port", str(port),
        "--parallel", "16", "--max-queue", "2000", "--log-level", "error",
    ]  # fmt: skip
    found = {"tinyoai": tiny}
    if all(importlib.util.find_spec(name) for name in ("uvicorn", "fastapi", "sse_starlette")):
        found["uvicorn, FastAPI, sse-starlette"] = [
            sys.executable, "-m", "uvicorn", "--app-dir", str(Path(__file__).parent), "rival_sse:app",
            "--port", str(port), "--log-level", "error", "--no-access-log", "--loop", "uvloop", "--http", "httptools",
        ]  # fmt: skip
    return found


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256, help="of each stream")
    parser.add_argument("--port", type=int, default=18_455)
    parser.add_argument("--connections", type=int, nargs="*", default=[1, 10, 100, 1000])
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    streams: list[list[str]] = []
    wholes: list[list[str]] = []
    base: dict[int, float] = {}
    for name, command in servers(args.port).items():
        with running(command, args.port) as pid:
            measure(pid, args.port, request(8, stream=True), 4, 4)
            for n in args.connections:
                n_times = max(1, 400 // n)
                ask = request(args.tokens, stream=True)
                runs = [measure(pid, args.port, ask, n, n_times) for _ in range(args.runs)]
                n_tokens = n * n_times * args.tokens
                micro = median([used for _, used in runs]) / n_tokens * 1e6
                base.setdefault(n, micro)
                speed = median([n_tokens / wall for wall, _ in runs])
                streams.append([str(n), name, f"{speed:,.0f}", f"{micro:.1f}", f"{micro / base[n]:.2f}"])
                ask = request(1, stream=False)
                runs = [measure(pid, args.port, ask, n, n_times) for _ in range(args.runs)]
                per = median([n * n_times / wall for wall, _ in runs])
                used = median([used for _, used in runs]) / (n * n_times) * 1e6
                wholes.append([str(n), name, f"{per:,.0f}", f"{used:.0f}"])
            if name == "tinyoai":
                idle = [socket.create_connection(("127.0.0.1", args.port)) for _ in range(900)]
                for sock in idle:
                    sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                for sock in idle:
                    sock.recv(4096)
                runs = [
                    measure(pid, args.port, request(args.tokens, stream=True), 10, 40)
                    for _ in range(args.runs)
                ]
                micro = median([used for _, used in runs]) / (400 * args.tokens) * 1e6
                ratio = f"{micro / base[10]:.2f}" if 10 in base else ""
                streams.append(["10 + 900 idle", name, "", f"{micro:.1f}", ratio])
                for sock in idle:
                    sock.close()
    show(
        f"streams of {args.tokens} tokens, median of {args.runs} runs; ratio: CPU beside tinyoai's",
        ["connections", "server", "tokens/s", "CPU, µs a token", "ratio"],
        sorted(streams, key=lambda row: int(row[0].split()[0])),
    )
    show(
        f"whole answers of one token, median of {args.runs} runs",
        ["connections", "server", "requests/s", "CPU, µs a request"],
        sorted(wholes, key=lambda row: int(row[0].split()[0])),
    )


if __name__ == "__main__":
    main()
