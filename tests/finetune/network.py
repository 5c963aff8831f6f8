"""The built-in model in torch."""

from tinyoai import gguf
from tinyoai.finetune import llama, weights
from tinyoai.finetune.__main__ import network_config
from tinyoai.finetune.train_config import TrainConfig


def network(header: gguf.Header, config: TrainConfig) -> llama.TrainableLlama:
    """Returns the built-in model as a network in torch."""
    return llama.build(network_config(header, 128), lambda name: weights.read(header, name), config)
