"""The llama network in torch, with optional LoRA adapters on its matrices.

It computes what ctransformers computes. Tensors have the names of GGUF files, except that "blk." is "blocks.".
LoRA: y = W x + (alpha / r) B A x, where W is frozen, A starts random and B starts as zeros (Hu et al. 2021).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyoai.finetune.train_config import TrainConfig

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
"""The matrices of a block. They are the ones that are trained."""
LAYERS = ("attn_norm", *MATRICES[:4], "ffn_norm", *MATRICES[4:])
"""Everything in a block, in the order of its computation."""

Array = NDArray[np.float32]
Read = Callable[[str], Array]
"""Returns a tensor of the model file by its name there."""


class LlamaConfig(NamedTuple):
    """Sizes of the network and constants of its norms and positions."""

    n_layer: int
    n_head: int
    n_head_kv: int
    n_embd: int
    n_ctx: int
    epsilon: float = 1e-5
    rope_base: float = 10_000.0
    rope_scale: float = 1.0


def rotary(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions, each [n_ctx, n_dim / 2] (Su et al. 2021)."""
    n_dim = config.n_embd // config.n_head
    frequency = config.rope_base ** (-torch.arange(0, n_dim, 2).float() / n_dim)
    angle = torch.outer(torch.arange(config.n_ctx).float() * config.rope_scale, frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x [batch, head, time, dim], the order of dimensions in GGUF files."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Block(nn.Module):
    """Attention and feed-forward, each after an RMS norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, layer: Callable[[str], nn.Module]) -> None:
        """`layer` returns the module for each name in LAYERS."""
        super().__init__()
        self.config = config
        for name in LAYERS:
            self.add_module(name, layer(name))

    def layer(self, name: str, x: Tensor) -> Tensor:
        """The output of one module."""
        y: Tensor = self.get_submodule(name)(x)
        return y

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, time, n_embd] → the same shape."""
        (b, t, d), config = x.shape, self.config
        n_dim = d // config.n_head
        h = self.layer("attn_norm", x)
        q = self.layer("attn_q", h).view(b, t, config.n_head, n_dim).transpose(1, 2)
        k = self.layer("attn_k", h).view(b, t, config.n_head_kv, n_dim).transpose(1, 2)
        v = self.layer("attn_v", h).view(b, t, config.n_head_kv, n_dim).transpose(1, 2)
        # under autocast the matrices return bfloat16 and the float32 rotation would widen q and k
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if (shared := config.n_head // config.n_head_kv) > 1:
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.layer("attn_output", y.transpose(1, 2).reshape(b, t, d))
        h = self.layer("ffn_norm", x)
        return x + self.layer("ffn_down", F.silu(self.layer("ffn_gate", h)) * self.layer("ffn_up", h))


class Llama(nn.Module):
    """The whole network."""

    def __init__(self, config: LlamaConfig, layer: Callable[[str], nn.Module]) -> None:
        """`layer` returns the module for each name: "token_embd", "blk.0.attn_norm" ..., "output"."""
        super().__init__()
        self.config = config
        self.token_embd = layer("token_embd")
        self.blocks = nn.ModuleList(
            Block(config, partial(_layer_of_block, layer, at)) for at in range(config.n_layer)
        )
        self.output_norm = layer("output_norm")
        self.output = layer("output")
        cos, sin = rotary(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, time] → final hidden states [batch, time, n_embd]."""
        x: Tensor = self.token_embd(ids)
        t = ids.shape[1]
        for block in self.blocks:
            x = block(x, self.get_buffer("cos")[:t], self.get_buffer("sin")[:t])
        y: Tensor = self.output_norm(x)
        return y

    def logits(self, states: Tensor) -> Tensor:
        """States [..., n_embd] → logits [..., n_vocab]."""
        y: Tensor = self.output(states)
        return y


def _layer_of_block(layer: Callable[[str], nn.Module], at: int, name: str) -> nn.Module:
    return layer(f"blk.{at}.{name}")


class Matrix(nn.Module):
    """A matrix [n_out, n_in]: frozen under a LoRA adapter of rank r, or trained itself if r is 0."""

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
        """The matrix with its adapter added."""
        if self.down is None or self.up is None:
            return self.weight.detach()
        return (self.weight + self.scale * (self.up @ self.down)).detach()


class Frozen(nn.Module):
    """A tensor of the model file that is not trained: embedding, norm or output matrix."""

    def __init__(self, weight: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> None:
        """`apply(x, weight)` returns the output."""
        super().__init__()
        self.register_buffer("weight", weight)
        self._apply_to = apply

    def forward(self, x: Tensor) -> Tensor:
        """The output of `apply`."""
        return self._apply_to(x, self.get_buffer("weight"))


class TrainableLlama(Llama):
    """A model file's network. The matrices of its blocks are trained, with adapters of rank r if r is not 0."""

    def __init__(self, config: LlamaConfig, read: Read, *, r: int = 0, alpha: int = 0) -> None:
        def layer(name: str) -> nn.Module:
            weight, kind = torch.from_numpy(read(f"{name}.weight")), name.rpartition(".")[2]
            if kind in MATRICES:
                return Matrix(weight, r, alpha)
            if kind == "token_embd":
                return Frozen(weight, lambda ids, rows: rows[ids])
            if kind == "output":
                return Frozen(weight, F.linear)
            return Frozen(weight, lambda x, scale: F.rms_norm(x, (config.n_embd,), scale, config.epsilon))

        super().__init__(config, layer)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def merged(self, name: str) -> Array:
        """A matrix by its name in the file, with its adapter added."""
        matrix = self.get_submodule(name.removesuffix(".weight").replace("blk.", "blocks.", 1))
        assert isinstance(matrix, Matrix)
        return np.array(matrix.merged().numpy(), np.float32)

    def changed(self) -> list[str]:
        """The names of all matrices that `merged` returns."""
        return [f"blk.{at}.{name}.weight" for at in range(self.config.n_layer) for name in MATRICES]


def build(config: LlamaConfig, read: Read, train_config: TrainConfig) -> TrainableLlama:
    """The network with adapters drawn from the seed."""
    torch.manual_seed(train_config.seed)
    r = train_config.lora_r if train_config.use_lora else 0
    return TrainableLlama(config, read, r=r, alpha=train_config.lora_alpha)
