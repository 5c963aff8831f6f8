"""Scores a model file by its greedy answers to held-out questions, computed by ctransformers."""

import argparse
import ctypes
from collections import defaultdict
from pathlib import Path
from random import Random

from ctransformers import LLM, Config

from training import corpus
from training.tokenizer import BOS, IM_END, IM_START

SEED = 20_240
AIMS = {"capitals": 99, "countries": 99, "unseen names": 95, "sums": 95, "refusals": 90}


class Model:
    """A model file, used through the library's C functions: its Python methods overflow a buffer on some texts."""

    def __init__(self, path: Path, n_threads: int = 1) -> None:
        self._llm = LLM(str(path), model_type="llama", config=Config(context_length=1024, threads=n_threads))
        self._n_threads = n_threads
        self._past: list[int] = []

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of one text segment."""
        raw = text.encode()
        ids = (ctypes.c_int * (4 * len(raw) + 16))()
        n = self._llm.ctransformers_llm_tokenize(raw, False, ids)
        return list(ids[:n])

    def prompt(self, turns: list[corpus.Turn]) -> list[int]:
        """Returns the ids of a conversation, up to the start of the assistant's answer."""
        ids = [BOS]
        for turn in turns:
            ids += [IM_START, *self.tokenize(f"{turn.role}\n{turn.content}"), IM_END, *self.tokenize("\n")]
        return [*ids, IM_START, *self.tokenize("assistant\n")]

    def complete(self, ids: list[int], n_max: int = 160) -> str:
        """Returns the greedy continuation, up to the end of the answer."""
        self._evaluate(ids, 0)
        n_past, out = len(ids), b""
        for _ in range(min(n_max, 1024 - n_past)):
            logits = self._llm.logits
            token = max(range(len(logits)), key=logits.__getitem__)
            if token in (IM_END, 2):
                break
            out += self._llm.detokenize([token], decode=False)
            self._evaluate([token], n_past)
            n_past += 1
        return out.decode("utf-8", "replace")

    def answer(self, turns: list[corpus.Turn]) -> str:
        """Returns the assistant's answer."""
        return self.complete(self.prompt(turns)).removeprefix(" ")

    def _evaluate(self, ids: list[int], n_past: int) -> None:
        for at in range(0, len(ids), 32):
            chunk = ids[at : at + 32]
            array = (ctypes.c_int * len(chunk))(*chunk)
            if not self._llm.ctransformers_llm_batch_eval(
                array, len(chunk), n_past + at, 32, self._n_threads
            ):
                raise RuntimeError("the library cannot evaluate")


def score(path: Path, per_category: int, show: int = 0) -> str:
    """Returns a Markdown table of correct answers by category."""
    model = Model(path)
    right: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    wrong: dict[str, list[str]] = defaultdict(list)
    for sample in corpus.held_out_samples(Random(SEED), per_category):
        expected = sample.turns[-1].content
        said = model.answer(sample.turns[:-1])
        total[sample.category] += 1
        if said == expected:
            right[sample.category] += 1
        else:
            wrong[sample.category].append(f"{sample.turns[-2].content!r}: {said!r}, not {expected!r}")
    lines = ["| category | right | of | share | aim |", "|---|---|---|---|---|"]
    for category, n in total.items():
        aim = f"{AIMS[category]} %" if category in AIMS else ""
        lines.append(f"| {category} | {right[category]} | {n} | {100 * right[category] / n:.1f} % | {aim} |")
    for category, found in wrong.items():
        for line in found[:show]:
            print(f"{category}: {line}")
    return "\n".join(lines)


def main() -> None:
    """Scores a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--per-category", type=int, default=200)
    parser.add_argument("--show", type=int, default=5, help="wrong answers to show for each category")
    args = parser.parse_args()
    print(score(args.path, args.per_category, args.show))


if __name__ == "__main__":
    main()
