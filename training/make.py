"""`python -m training.make` trains the built-in model and scores it, in less than 45 minutes on two cores."""

import argparse
import time
from pathlib import Path
from random import Random

import torch

from training import corpus, tokenizer, train
from training.export import export, load
from training.model import Llama
from training.score import score

SEED = 7
N_VOCAB = 1000
N_BATCH = 24
LENGTH = 256
STEPS = (2300, 2200)
"""Steps of the first stage, and of the second, which has the harder corpus and lower learning rates."""
SECOND_PEAK = 0.5
ROOT = Path(__file__).parent.parent


def main() -> None:
    """Trains, exports and scores the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "tinyoai" / "builtin" / "tinyoai-chat.gguf")
    parser.add_argument("--score", type=Path, default=ROOT / "training" / "SCORE.md")
    parser.add_argument(
        "--first", type=Path, help="the file of a finished first stage; only the second stage runs"
    )
    parser.add_argument("--float32", action="store_true", help="for processors without bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    torch.manual_seed(SEED)
    rng = Random(SEED)
    texts = [turn.content for _ in range(6000) for turn in corpus.dialogue(rng)]
    texts += [corpus.document(rng) for _ in range(600)]
    vocabulary = tokenizer.train(texts, N_VOCAB)
    model = Llama(len(vocabulary))
    first = args.first or args.out.with_suffix(".first")
    if args.first is None:
        run(model, vocabulary, first, seed=SEED, n_steps=STEPS[0], bf16=not args.float32)
    load(model, first)
    run(
        model,
        vocabulary,
        args.out,
        seed=SEED + 100,
        n_steps=STEPS[1],
        peak=SECOND_PEAK,
        hard=True,
        bf16=not args.float32,
    )
    if args.first is None:
        first.unlink()
    print(
        f"{args.out.name}: {args.out.stat().st_size / 1e6:.1f} MB after {time.monotonic() - started:.0f} s",
        flush=True,
    )
    table = score(args.out, 1000, show=4)
    print(table)
    args.score.write_text(
        "# Score of the built-in model\n\nGreedy answers of the exported file, run by ctransformers, to dialogues "
        "that are not in the training data.\nAn answer counts only if it is correct to the letter.\n\n"
        + table
        + "\n"
    )
    print(f"{time.monotonic() - started:.0f} s in total")


def run(
    model: Llama,
    vocabulary: tokenizer.Tokenizer,
    out: Path,
    *,
    n_steps: int,
    seed: int,
    bf16: bool,
    peak: float = 1.0,
    hard: bool = False,
) -> None:
    """Trains one stage and exports it, every 250 steps also to a temporary file."""
    part = out.with_suffix(".part")
    steps = train.train(
        model,
        vocabulary,
        n_steps=n_steps,
        n_batch=N_BATCH,
        length=LENGTH,
        seed=seed,
        bf16=bf16,
        peak=peak,
        hard=hard,
    )
    for step in steps:
        if step % 250 == 0:
            export(model, vocabulary, part)
    export(model, vocabulary, out)
    part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
