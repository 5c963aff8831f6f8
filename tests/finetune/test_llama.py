"""The network in torch computes the same logits as the library."""

import importlib.util

import pytest

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed: `make finetune` does that", allow_module_level=True)

import numpy as np
import torch

from tests.finetune.builtin import FRANCE, taught
from tests.finetune.network import network
from tinyoai import gguf
from tinyoai.engine.contract import Row
from tinyoai.engine.ctransformers.engine import CTransformersEngine
from tinyoai.finetune.train_config import TrainConfig


def test_the_network_computes_what_the_engine_serves(
    header: gguf.Header, engine: CTransformersEngine
) -> None:
    (sample,) = taught(engine, FRANCE)
    model = network(header, TrainConfig())
    with torch.no_grad():
        mine = model.logits(model(torch.tensor([sample.ids])))[0].numpy()
    theirs = []
    for at, token in enumerate(sample.ids):
        engine.eval([Row(0, [token], at)])
        theirs.append(np.array([engine.logits(0)[i] for i in range(engine.info.n_vocab)]))
    off = np.abs(mine - np.array(theirs)).max()
    assert off < 0.05 * np.abs(mine).max(), off  # the library rounds activations to 8 bits
    assert (mine.argmax(1) == np.array(theirs).argmax(1))[sample.n_prompt - 1 :].all()
