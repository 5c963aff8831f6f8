"""The recipe's network equals the one that fine-tuning trains: same tensors, same numbers."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed: `make finetune` does that", allow_module_level=True)

import torch

from tests.finetune.builtin import BUILTIN
from tests.finetune.network import network
from tinyoai import gguf
from tinyoai.finetune.train_config import TrainConfig
from training.export import export, load
from training.model import Llama
from training.tokenizer import Tokenizer


def test_a_file_has_the_same_logits_in_the_recipe_and_in_fine_tuning(tmp_path: Path) -> None:
    header = gguf.read_header(BUILTIN)
    tokens = header.metadata["tokenizer.ggml.tokens"]
    recipe, tuned = Llama(len(tokens)), network(header, TrainConfig())
    load(recipe, BUILTIN)
    ids = torch.randint(0, len(tokens), (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = recipe(ids)
        assert torch.equal(logits, tuned.logits(tuned(ids)))
    assert logits.std() > 0.5
    out = tmp_path / "again.gguf"
    export(recipe, Tokenizer([token.decode() for token in tokens[261:]]), out)
    again = gguf.read_header(out)
    assert list(again.tensors) == list(header.tensors)
    assert out.read_bytes() == BUILTIN.read_bytes()


def test_fresh_weights_leave_the_stream_as_it_is() -> None:
    torch.manual_seed(0)
    model = Llama(300)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids), model.output(model.output_norm(model.token_embd(ids))))
    assert all(parameter.requires_grad for parameter in model.parameters())
