"""Training: a llama as the inference library computes it, LoRA adapters on its matrices, and the steps.

Owns the only use of torch: the network, the loss, the optimizer, the schedule and checkpoints. Everything is
drawn from the seed and the step's number, so a run that goes on from a checkpoint makes the losses that one in
a single piece makes. It must not know files of models, texts or jobs.

LoRA: y = W x + (alpha / r) B A x with W frozen, A drawn at random and B zero at first (Hu et al. 2021).
"""

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyoai.finetune.train_config import Spec, Step
from tinyoai.host import atomic

WARM_UP = 0.03
"""The part of all steps in which the learning rate rises; from there it falls along a line."""
CLIP = 1.0
"""The longest gradient."""
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
"""What is adapted, in every block."""

Read = Callable[[str], "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"]


class Shape(NamedTuple):
    """Sizes of the network, and the numbers of its positions and norms."""

    n_layer: int
    n_head: int
    n_head_kv: int
    n_embd: int
    n_ctx: int
    epsilon: float
    rope_base: float = 10_000.0
    rope_scale: float = 1.0


class Sample(NamedTuple):
    """Token ids, and how many of them are read before the first that is learnt."""

    ids: list[int]
    n_read: int


class Adapted(nn.Module):
    """A matrix [n_out, n_in], frozen under an adapter of rank r; trained itself where r is 0."""

    def __init__(self, weight: Tensor, r: int, alpha: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=r == 0)
        self.scale = alpha / r if r else 0.0
        n_out, n_in = weight.shape
        self.down = nn.Parameter(torch.randn(r, n_in) / math.sqrt(n_in)) if r else None
        self.up = nn.Parameter(torch.zeros(n_out, r)) if r else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n_in] → [..., n_out]."""
        y = F.linear(x, self.weight)
        if self.down is None or self.up is None:
            return y
        return y.add_(F.linear(F.linear(x, self.down), self.up), alpha=self.scale)

    def merged(self) -> Tensor:
        """The matrix with what its adapter has learnt."""
        if self.down is None or self.up is None:
            return self.weight.detach()
        return (self.weight + self.scale * (self.up @ self.down)).detach()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs of x [batch, head, time, dim] (Su et al. 2021), as GGUF files have them."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Block(nn.Module):
    """Attention and feed-forward, each behind an RMS norm and added to the stream."""

    def __init__(self, shape: Shape, at: int, read: Read, r: int, alpha: int) -> None:
        super().__init__()
        self.shape = shape
        self.matrices = nn.ModuleDict(
            {name: Adapted(torch.from_numpy(read(f"blk.{at}.{name}.weight")), r, alpha) for name in MATRICES}
        )
        self.register_buffer("attn_norm", torch.from_numpy(read(f"blk.{at}.attn_norm.weight")))
        self.register_buffer("ffn_norm", torch.from_numpy(read(f"blk.{at}.ffn_norm.weight")))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, time, n_embd] → the same."""
        (b, t, d), shape, m = x.shape, self.shape, self.matrices
        n_dim = d // shape.n_head
        h = F.rms_norm(x, (d,), self.get_buffer("attn_norm"), shape.epsilon)
        q = m["attn_q"](h).view(b, t, shape.n_head, n_dim).transpose(1, 2)
        k = m["attn_k"](h).view(b, t, shape.n_head_kv, n_dim).transpose(1, 2)
        v = m["attn_v"](h).view(b, t, shape.n_head_kv, n_dim).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        shared = shape.n_head // shape.n_head_kv
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + m["attn_output"](y.transpose(1, 2).reshape(b, t, d))
        h = F.rms_norm(x, (d,), self.get_buffer("ffn_norm"), shape.epsilon)
        out: Tensor = x + m["ffn_down"](F.silu(m["ffn_gate"](h)) * m["ffn_up"](h))
        return out


class Llama(nn.Module):
    """The whole network, out of `read`'s tensors; rank 0 trains the matrices themselves."""

    def __init__(self, shape: Shape, read: Read, *, r: int = 0, alpha: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("token_embd", torch.from_numpy(read("token_embd.weight")))
        self.blocks = nn.ModuleList(Block(shape, at, read, r, alpha) for at in range(shape.n_layer))
        self.register_buffer("output_norm", torch.from_numpy(read("output_norm.weight")))
        self.register_buffer("output", torch.from_numpy(read("output.weight")))
        n_dim = shape.n_embd // shape.n_head
        frequency = shape.rope_base ** (-torch.arange(0, n_dim, 2).float() / n_dim)
        angle = torch.outer(torch.arange(shape.n_ctx).float() * shape.rope_scale, frequency)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, time] → the last states [batch, time, n_embd]."""
        x = self.get_buffer("token_embd")[ids]
        t = ids.shape[1]
        for block in self.blocks:
            x = block(x, self.get_buffer("cos")[:t], self.get_buffer("sin")[:t])
        return F.rms_norm(x, (self.shape.n_embd,), self.get_buffer("output_norm"), self.shape.epsilon)

    def logits(self, states: Tensor) -> Tensor:
        """States [..., n_embd] → logits [..., n_vocab]."""
        return F.linear(states, self.get_buffer("output"))

    def learnt(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def merged(self, name: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
        """A matrix of a block, by its name in the file, with what was learnt."""
        _, at, matrix, _ = name.split(".")
        block = self.blocks[int(at)]
        assert isinstance(block, Block)
        adapted = block.matrices[matrix]
        assert isinstance(adapted, Adapted)
        return np.array(adapted.merged().numpy(), np.float32)

    def changed(self) -> list[str]:
        """The names of all that `merged` has."""
        return [f"blk.{at}.{name}.weight" for at in range(self.shape.n_layer) for name in MATRICES]


def build(shape: Shape, read: Read, spec: Spec) -> Llama:
    """The network with its adapters, drawn from the seed."""
    torch.manual_seed(spec.seed)
    return Llama(shape, read, r=spec.lora_r if spec.use_lora else 0, alpha=spec.lora_alpha)


def set_threads(count: int) -> None:
    """How many threads a step may use."""
    torch.set_num_threads(count)


def n_steps(n_samples: int, spec: Spec) -> int:
    """Steps of the whole run: the last batch of an epoch may be a small one."""
    return spec.epochs * math.ceil(n_samples / spec.batch_size)


def rate(step: int, steps: int) -> float:
    """The learning rate's factor in step 0 to steps - 1."""
    warm = max(1.0, WARM_UP * steps)
    return min((step + 1) / warm, (steps - step) / max(1.0, steps - warm), 1.0)


def loss_of(model: Llama, samples: Sequence[Sample]) -> tuple[Tensor, int]:
    """The mean cross-entropy in nats of all tokens that are learnt, and how many those are."""
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    learnt = torch.zeros(len(samples), longest - 1, dtype=torch.bool)
    for i, sample in enumerate(samples):
        ids[i, : len(sample.ids)] = torch.tensor(sample.ids)
        learnt[i, sample.n_read - 1 : len(sample.ids) - 1] = True
    states = model(ids[:, :-1])[learnt]  # logits of what is only read are never made
    return F.cross_entropy(model.logits(states), ids[:, 1:][learnt]), int(learnt.sum())


def train(
    model: Llama,
    samples: Sequence[Sample],
    spec: Spec,
    checkpoint: Path,
    save_every_s: float,
    clock: Callable[[], float],
    of: str = "",
) -> Iterator[Step]:
    """Trains in place, a Step for each step; from the checkpoint on where there is one. Raises ArithmeticError.

    Saves a checkpoint every so many seconds. One that is damaged, or not `of` this model and order, counts as none.
    """
    learnt = model.learnt()
    optimizer = torch.optim.AdamW(list(learnt.values()), lr=spec.learning_rate, weight_decay=0.0)
    first = _resume(learnt, optimizer, checkpoint, of)
    steps, per_epoch = n_steps(len(samples), spec), math.ceil(len(samples) / spec.batch_size)
    begun = saved = clock()
    order: list[int] = []
    for step in range(first, steps):
        epoch, at = divmod(step, per_epoch)
        if at == 0 or not order:
            order = list(range(len(samples)))
            random.Random(spec.seed * 1_000_003 + epoch).shuffle(order)
        batch = [samples[i] for i in order[at * spec.batch_size : (at + 1) * spec.batch_size]]
        learning_rate = spec.learning_rate * rate(step, steps)
        optimizer.param_groups[0]["lr"] = learning_rate
        loss, n_learnt = loss_of(model, batch)
        loss.backward()
        if not math.isfinite(loss.item()):
            raise ArithmeticError(
                f"the loss is no number any more at step {step + 1}; take a smaller learning_rate"
            )
        torch.nn.utils.clip_grad_norm_(learnt.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        now = clock()
        yield Step(
            step=step + 1,
            epoch=round((step + 1) / per_epoch, 4),
            loss=round(loss.item(), 6),
            learning_rate=learning_rate,
            n_tokens=n_learnt,
            seconds=round(now - begun, 3),
        )
        if now - saved >= save_every_s:
            saved = now
            try:
                _save(learnt, optimizer, step + 1, checkpoint, of)
            except (OSError, RuntimeError) as error:  # torch tells a full disk either way; it is no end yet
                reason = getattr(error, "strerror", None) or "the disk may be full"
                print(f"the checkpoint of step {step + 1} cannot be written: {reason}", file=sys.stderr)


def _save(
    learnt: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int, path: Path, of: str
) -> None:
    temporary = path.with_name(f".{path.name}.part")
    state = {"of": of, "step": step, "learnt": dict(learnt), "optimizer": optimizer.state_dict()}
    with atomic.replacing(path, temporary) as file:
        torch.save(state, file)


def _resume(learnt: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, path: Path, of: str) -> int:
    """The number of steps made before; 0 without a checkpoint that can be used, and nothing is changed then."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True)
        step, values, means = int(state["step"]), state["learnt"], state["optimizer"]["state"]
        if state["of"] != of or values.keys() != learnt.keys():
            raise ValueError("of another run")
        for i, (name, parameter) in enumerate(learnt.items()):
            for value in (values[name], means[i]["exp_avg"], means[i]["exp_avg_sq"]):
                if value.shape != parameter.shape:
                    raise ValueError("of another shape")
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # what torch raises for a damaged file is no single kind
        print(
            f"the checkpoint cannot be used ({type(error).__name__}); from the start again", file=sys.stderr
        )
        return 0
    with torch.no_grad():
        for name, parameter in learnt.items():
            parameter.copy_(values[name])
    return step
