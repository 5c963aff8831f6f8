"""Training: windows of packed dialogues, losses, optimizers and schedule.

Muon (momentum orthogonalised by Newton-Schulz steps; Jordan et al. 2024) updates the matrices of the blocks, AdamW
everything else. All draws come from fixed seeds.
"""

import time
from collections.abc import Iterator
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from training import corpus
from training.model import Llama
from training.tokenizer import BOS, EOS, IM_END, IM_START, Tokenizer

READ_WEIGHT = 0.05
"""Loss weight of tokens that the model only reads."""


def encode_dialogue(tokenizer: Tokenizer, turns: list[corpus.Turn]) -> tuple[list[int], list[float]]:
    """Returns the ids of a dialogue as the server renders it, and the loss weight of each id."""
    ids, weights = [BOS], [0.0]
    for turn in turns:
        ids.append(IM_START)
        weights.append(READ_WEIGHT)
        head = tokenizer.encode(turn.role + "\n")
        body = tokenizer.encode(turn.role + "\n" + turn.content)
        said = (
            1.0
            if turn.role == "assistant" and turn.learn
            else READ_WEIGHT
            if turn.role != "assistant"
            else 0.0
        )
        ids += body
        weights += [READ_WEIGHT] * len(head) + [said] * (len(body) - len(head))
        ids.append(IM_END)
        weights.append(said)
        newline = tokenizer.encode("\n")
        ids += newline
        weights += [0.0] * len(newline)
    return ids, weights


def encode_document(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[float]]:
    """Returns the ids of a plain text and their loss weights. In sums, only the result has full weight."""
    ids, weights = [BOS], [0.0]
    body = tokenizer.encode(text)
    equals, newline = tokenizer.encode("=")[-1], tokenizer.encode("\n")[-1]
    weight = 1.0 if " = " not in text else READ_WEIGHT
    for token in body:
        ids.append(token)
        weights.append(weight)
        if " = " in text:
            weight = 1.0 if token == equals else READ_WEIGHT if token == newline else weight
    ids.append(EOS)
    weights.append(1.0)
    return ids, weights


def windows(
    tokenizer: Tokenizer, rng: Random, length: int, hard: bool = False
) -> Iterator[tuple[list[int], list[float]]]:
    """Yields windows of length + 1 ids with their loss weights, filled with whole dialogues and texts."""
    ids: list[int] = []
    weights: list[float] = []
    while True:
        while len(ids) <= length:
            if rng.random() < 0.16:
                more, by = encode_document(tokenizer, corpus.document(rng, hard))
            else:
                more, by = encode_dialogue(tokenizer, corpus.dialogue(rng, hard))
            ids += more
            weights += by
        yield ids[: length + 1], weights[: length + 1]
        # a window begins at the start of a dialogue
        rest = next((i for i in range(length + 1, len(ids)) if ids[i] == BOS), len(ids))
        ids, weights = ids[rest:], weights[rest:]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose updates a quintic Newton-Schulz iteration makes nearly orthogonal.

    Matrices of one shape are iterated together, in `dtype`: the iteration corrects its own rounding.
    """

    def __init__(
        self, params: list[Tensor], lr: float, momentum: float = 0.95, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self._dtype = dtype
        shapes = sorted({tuple(p.shape) for p in params})
        self._same = [[p for p in params if tuple(p.shape) == shape] for shape in shapes]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override] # no closure
        """Makes one update."""
        lr, momentum = self.param_groups[0]["lr"], self.param_groups[0]["momentum"]
        for same in self._same:
            updates = []
            for p in same:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - momentum)
                updates.append(p.grad.lerp(buffer, momentum))
            x = torch.stack(updates)
            x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(self._dtype)
            tall = x.shape[1] > x.shape[2]
            x = x.mT.contiguous() if tall else x
            for _ in range(5):
                gram = torch.bmm(x, x.mT)
                x = torch.baddbmm(
                    x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
                )
            x = x.mT if tall else x
            for p, update in zip(same, x.float(), strict=True):
                p.mul_(1 - lr * 0.02)
                p.add_(update, alpha=-lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def rate(step: int, n_steps: int) -> float:
    """Returns the factor of the learning rate: up in the first 3 % of steps, down to 0 in the second half."""
    warm, decay = 0.03 * n_steps, 0.5 * n_steps
    return min(1.0, (step + 1) / warm, max(0.0, (n_steps - step) / decay))


def train(
    model: Llama,
    tokenizer: Tokenizer,
    *,
    n_steps: int,
    n_batch: int,
    length: int,
    seed: int,
    bf16: bool,
    peak: float = 1.0,
    hard: bool = False,
) -> Iterator[int]:
    """Trains in place and yields the number of steps done after each step.

    In the last tenth of the steps windows are four times as long and a quarter as many. `peak` scales the learning
    rates; `hard` selects the corpus of the second stage.
    """
    torch.manual_seed(seed)
    short = windows(tokenizer, Random(seed), length, hard)
    long_ = windows(tokenizer, Random(seed + 1), 4 * length - 1, hard)
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    outer = [p for name, p in model.named_parameters() if not (p.ndim == 2 and name.startswith("blocks."))]
    muon = Muon(inner, lr=0.02, dtype=torch.bfloat16 if bf16 else torch.float32)
    adam = torch.optim.AdamW(outer, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    started, shown = time.monotonic(), 0.0
    for step in range(n_steps):
        late = step >= 0.9 * n_steps
        source, n = (long_, max(1, n_batch // 4)) if late else (short, n_batch)
        pairs = [next(source) for _ in range(n)]
        ids = torch.tensor([ids for ids, _ in pairs])
        weights = torch.tensor([by for _, by in pairs])[:, 1:].reshape(-1)
        factor = peak * rate(step, n_steps)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = 0.02 * factor, 4e-3 * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(ids[:, :-1])
        each = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].reshape(-1), reduction="none")
        loss = (each * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(outer, 1.0)
        muon.step()
        adam.step()
        muon.zero_grad()
        adam.zero_grad()
        shown = loss.item() if step == 0 else 0.95 * shown + 0.05 * loss.item()
        if step % 50 == 0 or step == n_steps - 1:
            said = each.detach()[weights == 1.0].mean().item()
            passed = time.monotonic() - started
            print(
                f"step {step:5d} of {n_steps}  loss {shown:.4f}  said {said:.4f}  {passed:.0f} s", flush=True
            )
        yield step + 1
