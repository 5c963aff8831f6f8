"""Measures two models that work at once, chat and embeddings, beside the same work in turns.

FILE is the chat model, or 110m for a generated one. One tinyoai serves both, and gives each a part of the cores while
both have work. llama-server needs a process for each, and both processes use all cores. Chat is one stream; the
embeddings are requests of one text each, one after the other, as many as take as long as the stream. A ratio is the
time in turns, divided by the time at once; the goal is at least 0.8.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from beside import Server, llama_server, post, running, text_of, tinyoai
from make_model import model
from table import median, show, stream

TEXT = 100
"""Tokens of a text to embed."""


def seconds(*work: Callable[[], None]) -> float:
    """Returns the seconds that pieces of work take at once."""
    threads = [threading.Thread(target=each) for each in work]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


class Work:
    """The two pieces of work of one pair of models."""

    def __init__(self, name: str, chat: Server, embed: Server, embed_model: str, n_tokens: int) -> None:
        self.name = name
        self._chat, self._embed, self._embed_model = chat, embed, embed_model
        self._n_tokens = n_tokens
        self._texts = [text_of(embed.port, TEXT, i) for i in range(20)]
        self._n_texts = 20
        self.turns: list[float] = []
        self.once: list[float] = []
        self.embed()
        self.chat()
        chat_s, embed_s = seconds(self.chat), seconds(self.embed)
        self._n_texts = max(1, round(self._n_texts * chat_s / embed_s))

    def chat(self) -> None:
        """Streams one answer."""
        body = {"max_tokens": self._n_tokens, "ignore_eos": True, "temperature": 0.8, "seed": 1}
        stream(
            self._chat.port,
            {**body, "messages": [{"role": "user", "content": "Tell me a story about a cat."}]},
        )

    def embed(self) -> None:
        """Embeds the texts."""
        for i in range(self._n_texts):
            text = f"{i} {self._texts[i % len(self._texts)]}"
            post(self._embed.port, "/v1/embeddings", model=self._embed_model, input=text)

    def run(self) -> None:
        """Does both pieces of work in turns, and then at once."""
        self.turns.append(seconds(self.chat) + seconds(self.embed))
        self.once.append(seconds(self.chat, self.embed))

    def row(self) -> list[str]:
        """The medians."""
        turns, once = median(self.turns), median(self.once)
        ratio = median([a / b for a, b in zip(self.turns, self.once, strict=True)])
        return [self.name, str(self._n_texts), f"{turns:.2f}", f"{once:.2f}", f"{ratio:.2f}"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="FILE")
    parser.add_argument(
        "--embed", default="embed-30m", help="the model for embeddings; the default is generated"
    )
    parser.add_argument("--tokens", type=int, default=150, help="tokens of the stream")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--flags", default="", help="further flags of tinyoai")
    args = parser.parse_args()
    chat, embed = model(args.model), model(args.embed)
    with tempfile.TemporaryDirectory(prefix="tinyoai-bench-") as folder:
        (Path(folder) / "embed.gguf").symlink_to(embed.absolute())
        flags = ("--engine", "llamacpp", "--ctx-size", "2048", "--models-dir", folder, *args.flags.split())
        commands = (
            llama_server(chat, n_threads=args.threads),
            llama_server(embed, n_threads=args.threads, embeddings=True),
            tinyoai(chat, *flags, n_threads=args.threads),
        )
        with running(*commands) as (chat_server, embed_server, ours):
            works = [
                Work("llama-server", chat_server, embed_server, "m", args.tokens),
                Work("tinyoai", ours, ours, "embed", args.tokens),
            ]
            for _ in range(args.runs):
                for work in works:
                    work.run()
    head = ["server", "texts", "in turns, s", "at once, s", "ratio"]
    title = (
        f"{args.tokens} tokens and texts of {TEXT}, median of {args.runs} runs, {chat.name} and {embed.name}"
    )
    show(title, head, [work.row() for work in works])


if __name__ == "__main__":
    main()
