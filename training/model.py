"""The built-in model's network: a llama of four layers with fresh weights."""

from torch import Tensor, nn

from tinyoai.finetune import llama
from tinyoai.finetune.llama import LlamaConfig

CONFIG = LlamaConfig(n_layer=4, n_head=4, n_head_kv=4, n_embd=256, n_ctx=1024)
N_FF = 704


class Llama(llama.Llama):
    """A network whose tensors are all trained. Matrices start random, but the last one of each sum as zeros."""

    def __init__(self, n_vocab: int, config: LlamaConfig = CONFIG, n_ff: int = N_FF) -> None:
        d = config.n_embd
        sizes = {"output": (d, n_vocab), "ffn_gate": (d, n_ff), "ffn_up": (d, n_ff), "ffn_down": (n_ff, d)}

        def layer(name: str) -> nn.Module:
            kind = name.rpartition(".")[2]
            if kind == "token_embd":
                return nn.Embedding(n_vocab, d)
            if kind.endswith("norm"):
                return nn.RMSNorm(d, eps=config.epsilon)
            return nn.Linear(*sizes.get(kind, (d, d)), bias=False)

        super().__init__(config, layer)
        self.n_ff = n_ff
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.attn_output.weight)
            nn.init.zeros_(block.ffn_down.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Maps ids [batch, time] to logits [batch, time, n_vocab]."""
        return self.logits(super().forward(ids))
