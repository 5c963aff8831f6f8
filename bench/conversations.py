"""Measures ten alternating conversations behind one system prompt: the total time of tinyoai and of llama-server.

FILE is a model, or 110m for a generated one. Each conversation begins with the system prompt and a long message of its
own. Then all conversations take one turn after the other: a short message is added, and the whole conversation is
sent. Each server gets its own answers back. Requests alternate between the servers, which keep their defaults. Goal:
at most 0.8 times the time of llama-server.
"""

import argparse
from typing import Any

from beside import llama_server, running, text_of, tinyoai
from make_model import model
from table import show, stream


class Conversation:
    """One conversation with one server."""

    def __init__(self, port: int, system: str, opening: str) -> None:
        self._port = port
        self._messages = [{"role": "system", "content": system}]
        self._next = opening

    def turn(self, question: str, n_answer: int) -> tuple[float, int]:
        """Sends the conversation with a question. Returns the seconds of the answer and the cached prompt tokens."""
        self._messages.append({"role": "user", "content": f"{self._next} {question}".strip()})
        self._next = ""
        body: dict[str, Any] = {"messages": self._messages, "max_tokens": n_answer}
        found = stream(self._port, {**body, "temperature": 0, "ignore_eos": True})
        self._messages.append({"role": "assistant", "content": found.text})
        return found.end - found.begin, found.n_cached


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="FILE")
    parser.add_argument("--conversations", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--tokens", type=int, default=2000, help="tokens of a conversation before its first answer"
    )
    parser.add_argument("--system", type=int, default=1000, help="those of them that all conversations share")
    parser.add_argument("--question", type=int, default=20, help="tokens that each turn adds")
    parser.add_argument("--answer", type=int, default=24)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--flags", default="", help="further flags of tinyoai")
    args = parser.parse_args()
    if args.tokens <= args.system + args.question:
        parser.error(
            f"--tokens must be over {args.system + args.question}: the system prompt and the question"
        )
    file = model(args.model)
    flags = ("--engine", "llamacpp", *args.flags.split())
    seconds: dict[str, list[float]] = {}
    cached: dict[str, int] = {}
    commands = (llama_server(file, n_threads=args.threads), tinyoai(file, *flags, n_threads=args.threads))
    with running(*commands) as servers:
        port = servers[1].port
        system = text_of(port, args.system, 1)
        openings = [
            text_of(port, args.tokens - args.system - args.question, 100 + i)
            for i in range(args.conversations)
        ]
        questions = [text_of(port, args.question, 10_000 + i) for i in range(args.turns * args.conversations)]
        open_ = {s.name: [Conversation(s.port, system, opening) for opening in openings] for s in servers}
        seconds = {s.name: [0.0] * args.turns for s in servers}
        cached = {s.name: 0 for s in servers}
        for turn in range(args.turns):
            for i in range(args.conversations):
                for server in servers:
                    question = questions[turn * args.conversations + i]
                    spent, n_cached = open_[server.name][i].turn(question, args.answer)
                    seconds[server.name][turn] += spent
                    cached[server.name] += n_cached
    theirs, ours = seconds["llama-server"], seconds["tinyoai"]
    rows = [
        [
            f"turn {turn + 1}, s",
            f"{theirs[turn]:.2f}",
            f"{ours[turn]:.2f}",
            f"{ours[turn] / theirs[turn]:.2f}",
        ]
        for turn in range(args.turns)
    ]
    rows.append(["total, s", f"{sum(theirs):.2f}", f"{sum(ours):.2f}", f"{sum(ours) / sum(theirs):.2f}"])
    rows.append(["prompt tokens from a cache", str(cached["llama-server"]), str(cached["tinyoai"]), ""])
    title = f"{args.conversations} conversations of {args.tokens} tokens, {args.system} of them shared, {file.name}"
    show(title, ["work", "llama-server", "tinyoai", "ratio"], rows)


if __name__ == "__main__":
    main()
