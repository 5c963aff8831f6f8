"""Starts tinyoai and llama.cpp's own server on the same weights, and measures both in turns.

llama-server comes from the package xllamacpp and keeps its defaults: its own number of slots, which share one KV cache,
its prompt cache on. It gets as many threads as tinyoai may use. Further flags are printed.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

from table import median

from tinyoai.host import cores

STARTING_S = 120.0
SYLLABLES = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "za")
"""Texts of their words are long, all different, and made for any vocabulary."""

LLAMA_SERVER = """
import json, sys, xllamacpp
wanted = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.port = wanted["model"], wanted["port"]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = wanted["n_threads"]
params.n_gpu_layers, params.n_parallel = 0, wanted["n_slots"]
params.embedding = wanted["embeddings"]
if wanted["unified"]:
    params.kv_unified = True
server = xllamacpp.Server(params)
sys.stdin.read()
"""


class Server(NamedTuple):
    """A running server."""

    name: str
    port: int
    process: "subprocess.Popen[bytes]"

    def stop(self) -> None:
        """Ends it as a user does, and waits."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Command(NamedTuple):
    """A server to start: its name, the arguments of the Python interpreter, and what a reader should know of them."""

    name: str
    port: int
    args: Sequence[str]
    flags: str

    def start(self, home: str = "") -> Server:
        """Starts it without waiting. `home` is a data directory that outlives the process."""
        process = subprocess.Popen(
            [sys.executable, *self.args],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **({"TINYOAI_HOME": home} if home else {})},
        )
        return Server(self.name, self.port, process)


def llama_server(
    model: Path, *, n_slots: int = -1, n_threads: int = 0, unified: bool = False, embeddings: bool = False
) -> Command:
    """The rival. Without n_slots it chooses, and its slots share one KV cache; else they do that with `unified`."""
    port, n_threads = free_port(), n_threads or cores.available()
    wanted = {
        "model": str(model),
        "port": port,
        "n_threads": n_threads,
        "n_slots": n_slots,
        "unified": unified,
        "embeddings": embeddings,
    }
    flags = [f"--threads {n_threads}"]
    flags += (
        [f"--parallel {n_slots}"] * (n_slots > 0) + ["--kv-unified"] * unified + ["--embeddings"] * embeddings
    )
    args = ["-c", LLAMA_SERVER, json.dumps(wanted)]
    return Command("llama-server", port, args, " ".join(flags))


def tinyoai(model: Path, *flags: str, name: str = "tinyoai", n_threads: int = 0) -> Command:
    """This server, which serves the model as `m`."""
    port = free_port()
    given = [*flags, *(("--threads", str(n_threads)) if n_threads else ())]
    args = ["-m", "tinyoai", "--model", str(model), "--model-name", "m", "--port", str(port), *given]
    return Command(name, port, args, " ".join(given))


def free_port() -> int:
    """Returns a port of the loopback address that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running(*commands: Command, home: str = "") -> Iterator[list[Server]]:
    """Prints the flags of these servers, runs them side by side, and ends them."""
    for command in commands:
        print(f"{command.name}: {command.flags or 'defaults'}", flush=True)
    servers = [command.start(home) for command in commands]
    try:
        for server in servers:
            wait_ready(server)
        yield servers
    finally:
        for server in servers:
            server.stop()


def wait_ready(server: Server) -> None:
    """Waits until a server answers. Raises RuntimeError if it ends or takes too long."""
    begin = time.perf_counter()
    while not healthy(server.port):
        if server.process.poll() is not None or time.perf_counter() - begin > STARTING_S:
            server.process.kill()
            raise RuntimeError(f"{server.name} did not get ready")
        time.sleep(0.002)


def healthy(port: int) -> bool:
    """Says whether the server is ready to answer."""
    try:
        return bool(get(port, "/health").get("status") == "ok")
    except (OSError, ValueError):
        return False


def get(port: int, path: str) -> Any:
    """Returns the parsed answer to a GET. Raises OSError or ValueError."""
    return _exchange(port, "GET", path, None)


def post(port: int, path: str, **body: Any) -> Any:
    """Returns the parsed answer to a POST. Raises OSError or ValueError."""
    return _exchange(port, "POST", path, json.dumps(body))


def _exchange(port: int, method: str, path: str, body: str | None) -> Any:
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        raw = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"{path}: {response.status} {raw.decode()}")
    return json.loads(raw)


def text_of(port: int, n_tokens: int, seed: int) -> str:
    """Returns a text of about n_tokens tokens, by the tokenizer of a running server."""
    draw = random.Random(seed)

    def more(n: int) -> list[str]:
        return ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(n)]

    words = more(n_tokens)
    for _ in range(3):
        n = count_tokens(port, " ".join(words))
        if abs(n - n_tokens) <= n_tokens // 100:
            break
        wanted = max(1, round(len(words) * n_tokens / n))
        words = words[:wanted] + more(wanted - len(words))
    return " ".join(words)


def count_tokens(port: int, text: str) -> int:
    """Returns the number of tokens of a text, without a chat template."""
    return len(post(port, "/tokenize", content=text)["tokens"])


def alternate(runs: int, work: dict[str, Callable[[int], float]]) -> dict[str, float]:
    """Returns the median of each piece of work. Runs alternate, so that a busy minute hits all of them."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for run in range(runs):
        for name, measure in work.items():
            found[name].append(measure(run))
    return {name: median(values) for name, values in found.items()}
