"""Compares the quality and speed of the pooling methods on a model that was trained to chat.

Paraphrases are compared with unrelated sentences. "ordered" is the share of pairs of a paraphrase and an unrelated
sentence in which the paraphrase has the higher cosine. "nearest" is the share of sentences whose nearest other
sentence is a paraphrase. Neither needs a threshold, because the range of cosines depends on the pooling.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection
from pathlib import Path

from concurrent_streams import wait
from startup import servers
from table import median, show

from tinyoai.app import BUILTIN

WAYS = ("last", "mean", "weighted-mean")
TEXT = "The quick brown fox jumps over the lazy dog. "
REPEATS = 5
GROUPS = (
    (
        "What is the capital of France?",
        "Which city is the capital of France?",
        "Tell me the capital of France.",
        "France's capital city, please",
    ),
    ("What is 2 plus 3?", "How much is 2 + 3?", "Add 2 and 3.", "2 + 3 = ?"),
    (
        "Tell me a story.",
        "Please tell me a short story.",
        "Can you tell a story?",
        "I would like to hear a story.",
    ),
    (
        "Hello, how are you?",
        "Hi! How are you doing?",
        "Good morning, how are you today?",
        "Hey, how is it going?",
    ),
    ("My name is Alice.", "I am called Alice.", "You can call me Alice.", "Alice is my name."),
    (
        "The cat sat on the mat.",
        "A cat is sitting on the mat.",
        "The cat was on the mat.",
        "On the mat sat a cat.",
    ),
    (
        "It will rain tomorrow.",
        "Tomorrow there will be rain.",
        "Rain is expected tomorrow.",
        "The weather tomorrow is rainy.",
    ),
    (
        "I like to eat apples and pears.",
        "Apples and pears are what I like to eat.",
        "I enjoy eating pears and apples.",
        "I love apples and pears.",
    ),
    (
        "The train leaves at nine.",
        "The train departs at nine o'clock.",
        "At nine the train leaves.",
        "Our train goes at nine.",
    ),
    ("What does the word river mean?", "Explain the word river.", "What is a river?", "Define river."),
)


@contextlib.contextmanager
def serving(model: Path, way: str, port: int) -> Iterator[None]:
    """Runs tinyoai with one pooling method."""
    command = [*servers(model)["tinyoai"](port), "--pooling", way]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait(port)
        yield
    finally:
        process.terminate()
        process.wait()


def embed(port: int, texts: Sequence[str]) -> tuple[list[list[float]], int]:
    """Returns the vectors of texts and their number of tokens."""
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/embeddings", json.dumps({"model": "m", "input": texts}))
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return [entry["embedding"] for entry in answer["data"]], answer["usage"]["prompt_tokens"]


def quality(vectors: list[list[float]], group_of: list[int]) -> tuple[float, float]:
    """Returns the shares "ordered" and "nearest"."""
    n = len(vectors)
    cosine = [[sum(map(float.__mul__, a, b)) for b in vectors] for a in vectors]
    alike = [cosine[i][j] for i, j in itertools.combinations(range(n), 2) if group_of[i] == group_of[j]]
    unlike = [cosine[i][j] for i, j in itertools.combinations(range(n), 2) if group_of[i] != group_of[j]]
    ordered = sum(a > u for a in alike for u in unlike) / (len(alike) * len(unlike))
    nearest = [max((j for j in range(n) if j != i), key=cosine[i].__getitem__) for i in range(n)]
    return ordered, sum(group_of[i] == group_of[j] for i, j in enumerate(nearest)) / n


def speed(port: int, text: str, n: int) -> float:
    """Returns tokens per second over n different inputs, so that no cache helps."""
    rates = []
    for repeat in range(REPEATS):
        texts = [f"{repeat} {i} {text}" for i in range(n)]
        started = time.perf_counter()
        _, n_tokens = embed(port, texts)
        rates.append(n_tokens / (time.perf_counter() - started))
    return median(rates)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--port", type=int, default=18_441)
    args = parser.parse_args()
    texts = [text for group in GROUPS for text in group]
    group_of = [number for number, group in enumerate(GROUPS) for _ in group]
    rows = []
    for way in WAYS:
        with serving(args.model, way, args.port):
            ordered, nearest = quality(embed(args.port, texts)[0], group_of)
            rates = [speed(args.port, TEXT * 5, 1), speed(args.port, TEXT, 64)]
        rows.append([way, f"{ordered:.3f}", f"{nearest:.3f}", *(f"{rate:.0f}" for rate in rates)])
    head = ["pooling", "ordered", "nearest", "tokens/s, one long input", "tokens/s, 64 short inputs"]
    show(f"pooling, {args.model.name}", head, rows)


if __name__ == "__main__":
    main()
