"""Training steps: loss, optimizer, learning-rate schedule and checkpoints.

Every draw depends on the seed and the step number alone, so a run that resumes from a checkpoint has the same
losses as an uninterrupted one.
"""

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyoai.finetune.llama import TrainableLlama
from tinyoai.finetune.protocol import Step
from tinyoai.finetune.samples import Sample
from tinyoai.finetune.train_config import TrainConfig
from tinyoai.host import atomic

WARM_UP = 0.03
"""Share of the steps in which the learning rate rises; after them it falls linearly to 0."""
MAX_GRAD_NORM = 1.0


def set_threads(count: int) -> None:
    """Set how many threads a step may use."""
    torch.set_num_threads(count)


def n_steps(n_samples: int, config: TrainConfig) -> int:
    """Steps of the whole run. The last batch of an epoch may be smaller."""
    return config.epochs * math.ceil(n_samples / config.batch_size)


def rate(step: int, steps: int) -> float:
    """The factor of the learning rate in a step from 0 to steps - 1."""
    warm = max(1.0, WARM_UP * steps)
    return min((step + 1) / warm, (steps - step) / max(1.0, steps - warm), 1.0)


def loss_of(model: TrainableLlama, samples: Sequence[Sample]) -> tuple[Tensor, int]:
    """The mean cross-entropy in nats over all learned tokens, and their number."""
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    learned = torch.zeros(len(samples), longest - 1, dtype=torch.bool)
    for i, sample in enumerate(samples):
        ids[i, : len(sample.ids)] = torch.tensor(sample.ids)
        learned[i, sample.n_prompt - 1 : len(sample.ids) - 1] = True
    states = model(ids[:, :-1])[
        learned
    ]  # no logits for tokens that are only read: they are the largest tensor
    return F.cross_entropy(model.logits(states), ids[:, 1:][learned]), int(learned.sum())


def train(
    model: TrainableLlama,
    samples: Sequence[Sample],
    config: TrainConfig,
    checkpoint: Path,
    save_every_s: float,
    clock: Callable[[], float],
    run_id: str = "",
) -> Iterator[Step]:
    """Train in place and yield each step, from the checkpoint on if there is one.

    Saves a checkpoint every `save_every_s` seconds. A checkpoint that is damaged or has another `run_id` is
    ignored. Raises ArithmeticError if the loss is not finite.
    """
    parameters = model.trained_parameters()
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=config.learning_rate, weight_decay=0.0)
    first = _resume(parameters, optimizer, checkpoint, run_id)
    steps, per_epoch = n_steps(len(samples), config), math.ceil(len(samples) / config.batch_size)
    begun = saved = clock()
    order: list[int] = []
    for step in range(first, steps):
        epoch, at = divmod(step, per_epoch)
        if at == 0 or not order:
            order = list(range(len(samples)))
            random.Random(config.seed * 1_000_003 + epoch).shuffle(order)
        batch = [samples[i] for i in order[at * config.batch_size : (at + 1) * config.batch_size]]
        learning_rate = config.learning_rate * rate(step, steps)
        optimizer.param_groups[0]["lr"] = learning_rate
        loss, n_learned = loss_of(model, batch)
        loss.backward()
        if not math.isfinite(loss.item()):
            raise ArithmeticError(f"the loss is not finite at step {step + 1}; use a smaller learning_rate")
        torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        now = clock()
        yield Step(
            step=step + 1,
            epoch=round((step + 1) / per_epoch, 4),
            loss=round(loss.item(), 6),
            learning_rate=learning_rate,
            n_tokens=n_learned,
            seconds=round(now - begun, 3),
        )
        if now - saved >= save_every_s:
            saved = now
            try:
                _save(parameters, optimizer, step + 1, checkpoint, run_id)
            except (
                OSError,
                RuntimeError,
            ) as error:  # torch raises either for a full disk; training can go on
                reason = getattr(error, "strerror", None) or "the disk may be full"
                print(f"the checkpoint of step {step + 1} cannot be written: {reason}", file=sys.stderr)


# -- checkpoints: version 0.1 writes and reads the same keys ----------------------------------------


def _save(
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    path: Path,
    run_id: str,
) -> None:
    temporary = path.with_name(f".{path.name}.part")
    learned = {_stored_name(name): parameter for name, parameter in parameters.items()}
    state = {"of": run_id, "step": step, "learnt": learned, "optimizer": optimizer.state_dict()}
    with atomic.replacing(path, temporary) as file:
        torch.save(state, file)


def _resume(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, path: Path, run_id: str
) -> int:
    """Load a checkpoint and return its number of steps; 0, and nothing changed, if none is usable."""
    if not path.exists():
        return 0
    names = {name: _stored_name(name) for name in parameters}
    try:
        state = torch.load(path, weights_only=True)
        step, values, means = int(state["step"]), state["learnt"], state["optimizer"]["state"]
        if state["of"] != run_id or values.keys() != set(names.values()):
            raise ValueError("of another run")
        for i, (name, parameter) in enumerate(parameters.items()):
            for value in (values[names[name]], means[i]["exp_avg"], means[i]["exp_avg_sq"]):
                if value.shape != parameter.shape:
                    raise ValueError("of another shape")
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # torch raises many kinds for a damaged file
        print(
            f"the checkpoint cannot be used ({type(error).__name__}); starting from step 1", file=sys.stderr
        )
        return 0
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[names[name]])
    return step


def _stored_name(name: str) -> str:
    """blocks.0.attn_q.up → blocks.0.matrices.attn_q.up."""
    blocks, at, rest = name.split(".", 2)
    return f"{blocks}.{at}.matrices.{rest}"
