"""The network: a llama of four layers, as the inference library computes it.

Owns shapes and forward pass: RMS norm, interleaved rotary positions, causal attention, SwiGLU. It must not
know text or files.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Shape(NamedTuple):
    """Sizes of the network."""

    n_vocab: int
    n_layer: int = 4
    n_embd: int = 256
    n_head: int = 4
    n_ff: int = 704
    n_ctx: int = 1024


def rotary(n_ctx: int, n_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [n_ctx, n_dim / 2], base 10000 (Su et al. 2021)."""
    frequency = 10_000.0 ** (-torch.arange(0, n_dim, 2).float() / n_dim)
    angle = torch.outer(torch.arange(n_ctx).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs of x [batch, head, time, dim]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, ff = shape.n_embd, shape.n_ff
        self.n_head = shape.n_head
        self.attn_norm = nn.RMSNorm(d, eps=1e-5)
        self.attn_q = nn.Linear(d, d, bias=False)
        self.attn_k = nn.Linear(d, d, bias=False)
        self.attn_v = nn.Linear(d, d, bias=False)
        self.attn_output = nn.Linear(d, d, bias=False)
        self.ffn_norm = nn.RMSNorm(d, eps=1e-5)
        self.ffn_gate = nn.Linear(d, ff, bias=False)
        self.ffn_up = nn.Linear(d, ff, bias=False)
        self.ffn_down = nn.Linear(ff, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, time, n_embd] → the same."""
        b, t, d = x.shape
        h = self.attn_norm(x)
        q, k, v = (
            f(h).view(b, t, self.n_head, -1).transpose(1, 2) for f in (self.attn_q, self.attn_k, self.attn_v)
        )
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v, is_causal=True
        )
        x = x + self.attn_output(y.transpose(1, 2).reshape(b, t, d))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Llama(nn.Module):
    """The whole network."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.output_norm = nn.RMSNorm(shape.n_embd, eps=1e-5)
        self.output = nn.Linear(shape.n_embd, shape.n_vocab, bias=False)
        cos, sin = rotary(shape.n_ctx, shape.n_embd // shape.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.attn_output.weight)
            nn.init.zeros_(block.ffn_down.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, time] → logits [batch, time, n_vocab]."""
        x = self.token_embd(ids)
        t = ids.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:t], self.sin[:t])
        return self.output(self.output_norm(x))
