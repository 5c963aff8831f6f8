"""Runs llama.cpp's own server from the package xllamacpp, as the reference for tinyoai's answers.

It is a process of its own: this file is also the program, and the one place that imports xllamacpp's Python.
"""

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POOLING = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}


class LlamaServer:
    """A running reference server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, **body: Any) -> Any:
        """The parsed answer to a POST with a JSON object."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def complete(self, prompt: str | list[int], n: int) -> Any:
        """The greedy continuation of a prompt: `tokens`, `content` and `completion_probabilities` with 5 tokens each."""
        return self.post(
            "/completion",
            prompt=prompt,
            n_predict=n,
            temperature=0,
            n_probs=5,
            return_tokens=True,
            cache_prompt=False,
            samplers=["temperature"],
        )

    def embed(self, text: str | list[int]) -> list[float]:
        """The pooled and normalized embedding of a text."""
        (row,) = self.post("/v1/embeddings", input=text)["data"]
        return list(row["embedding"])

    def rank(self, query: str, documents: list[str]) -> list[float]:
        """The score of each document, in the order of the documents."""
        rows = self.post("/v1/rerank", query=query, documents=documents)["results"]
        return [row["relevance_score"] for row in sorted(rows, key=lambda row: int(row["index"]))]


def installed() -> bool:
    """Says whether xllamacpp can be imported."""
    return importlib.util.find_spec("xllamacpp") is not None


@contextlib.contextmanager
def llama_server(
    model: Path,
    *,
    n_ctx: int,
    n_batch: int,
    n_threads: int = 1,
    embeddings: bool = False,
    pooling: str | None = None,
) -> Iterator[LlamaServer]:
    """Serves one model with one slot on a free port of the loopback address. `n_batch` tokens are one prefill step."""
    wanted = {
        "model": str(model),
        "n_ctx": n_ctx,
        "n_batch": n_batch,
        "n_threads": n_threads,
        "embedding": embeddings,
        "pooling_type": -1 if pooling is None else POOLING[pooling],
    }
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(wanted)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=said.extend, args=(process.stderr,), daemon=True)
    reader.start()
    try:
        assert process.stdout is not None
        # the library may write lines of its own
        lines = (line.strip() for line in process.stdout)
        url = next((line.removeprefix("listening ") for line in lines if line.startswith("listening ")), None)
        assert url, "llama-server did not start: " + "".join(said[-20:])
        yield LlamaServer(url)
    finally:
        process.kill()
        process.wait()
        reader.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def main() -> None:
    """Serves until stdin ends."""
    import xllamacpp

    wanted = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = wanted["model"]
    params.n_ctx = wanted["n_ctx"]
    params.n_batch = params.n_ubatch = wanted["n_batch"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = wanted["n_threads"]
    params.embedding = wanted["embedding"]
    params.pooling_type = xllamacpp.llama_pooling_type(wanted["pooling_type"])
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.fit_params = False
    params.warmup = False
    # as tinyoai: every layer keeps the whole window, and its cells are in the same order
    params.swa_full = True
    # nothing that survives a request: a checkpoint cuts a prompt, and a cached prompt is not evaluated again
    params.n_ctx_checkpoints = 0
    params.cache_ram_mib = 0
    params.cache_prompt = False
    server = xllamacpp.Server(params)
    print(f"listening {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
