"""Training steps: what is taught is learned, and a run resumes as if it had not been interrupted."""

import importlib.util
from itertools import islice
from pathlib import Path

import pytest

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed: `make finetune` does that", allow_module_level=True)

import torch

from tests.finetune.builtin import FRANCE, GATE, KEY, taught
from tests.finetune.network import network
from tinyoai import gguf
from tinyoai.engine.ctransformers.engine import CTransformersEngine
from tinyoai.engine.ctransformers.facts import require
from tinyoai.finetune import llama, train, weights
from tinyoai.finetune.__main__ import network_config
from tinyoai.finetune.protocol import Step
from tinyoai.finetune.train_config import TrainConfig


def test_the_loss_of_known_answers_is_small(header: gguf.Header, engine: CTransformersEngine) -> None:
    model = network(header, TrainConfig())
    with torch.no_grad():
        known, n_learned = train.loss_of(model, taught(engine, FRANCE))
        unknown, _ = train.loss_of(model, taught(engine, KEY))
    assert known.item() < 0.1
    assert unknown.item() > 2
    text = b"".join(engine.piece(token) for token in taught(engine, FRANCE)[0].ids[-n_learned:])
    assert text == b"The capital of France is Paris."  # the token that ends the answer has no text


def test_padding_changes_nothing(header: gguf.Header, engine: CTransformersEngine) -> None:
    model = network(header, TrainConfig())
    short, long_ = taught(engine, KEY, ("Tell me about the gate, please, and who it is?", GATE[1]))
    with torch.no_grad():
        one, n_one = train.loss_of(model, [short])
        two, n_two = train.loss_of(model, [long_])
        both, n_both = train.loss_of(model, [short, long_])
    assert n_both == n_one + n_two
    assert abs(both.item() * n_both - one.item() * n_one - two.item() * n_two) < 1e-3


@pytest.mark.parametrize("use_lora", [True, False])
def test_the_model_learns_and_is_written(
    header: gguf.Header, engine: CTransformersEngine, use_lora: bool, tmp_path: Path
) -> None:
    config = TrainConfig(epochs=25, learning_rate=2e-3 if use_lora else 3e-4, use_lora=use_lora)
    model, taught_ = network(header, config), taught(engine, KEY, GATE)
    steps = list(train.train(model, taught_, config, tmp_path / "c", 1e9, float))
    assert [step.step for step in steps] == list(range(1, 26))
    assert steps[-1].loss < 0.1 < 2 < steps[0].loss
    assert max(step.learning_rate for step in steps) == config.learning_rate
    assert steps[-1].learning_rate < steps[-2].learning_rate
    out = tmp_path / "new.gguf"
    weights.write(header, model.changed(), model.merged, out)
    made = gguf.read_header(out)
    require(made)
    assert made.metadata == header.metadata
    assert {name: tensor[1:] for name, tensor in made.tensors.items()} == {
        name: tensor[1:] for name, tensor in header.tensors.items()
    }
    assert (weights.read(made, "token_embd.weight") == weights.read(header, "token_embd.weight")).all()
    again = llama.build(network_config(made, 128), lambda name: weights.read(made, name), TrainConfig())
    with torch.no_grad():
        assert train.loss_of(again, taught_)[0].item() < 0.2
    assert not list(tmp_path.glob(".*"))


def test_a_resumed_run_equals_an_uninterrupted_one(
    header: gguf.Header, engine: CTransformersEngine, tmp_path: Path
) -> None:
    config, known = (
        TrainConfig(epochs=6, batch_size=2, learning_rate=1e-3, seed=5),
        taught(engine, KEY, GATE, FRANCE),
    )

    def run(name: str, n: int | None) -> list[Step]:
        steps = train.train(network(header, config), known, config, tmp_path / name, 0.0, float)
        return list(islice(steps, n))

    whole = [step.loss for step in run("whole", None)]
    first = [step.loss for step in run("parts", 5)]  # step 5 is reported before it is saved
    rest = run("parts", None)
    assert rest[0].step == 5
    assert first[:4] + [step.loss for step in rest] == whole


@pytest.mark.parametrize("damage", ["empty", "short", "torn", "keys", "shapes", "state", "of"])
def test_a_checkpoint_that_cannot_be_used_counts_as_none(
    header: gguf.Header, engine: CTransformersEngine, tmp_path: Path, damage: str
) -> None:
    config, known, path = TrainConfig(epochs=2, batch_size=1), taught(engine, KEY, GATE), tmp_path / "c"
    first = list(islice(train.train(network(header, config), known, config, path, 0.0, float, "this"), 3))
    data = path.read_bytes()
    state = torch.load(path, weights_only=True)
    name = next(iter(state["learnt"]))
    assert "blocks.0.matrices.attn_q.down" in state["learnt"], "version 0.1 stores this name"
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "short":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "torn":
        path.write_bytes(bytes(4096) + data[4096:])
    elif damage == "keys":
        del state["learnt"][name]
    elif damage == "shapes":
        state["learnt"][name] = state["learnt"][name][:1]
    elif damage == "state":
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    if damage in ("keys", "shapes", "state"):
        torch.save(state, path)
    of = "other" if damage == "of" else "this"
    again = list(islice(train.train(network(header, config), known, config, path, 1e9, float, of), 3))
    assert [(step.step, step.loss) for step in again] == [(step.step, step.loss) for step in first]


def test_a_rate_that_is_too_high_ends_the_run(
    header: gguf.Header, engine: CTransformersEngine, tmp_path: Path
) -> None:
    model = network(header, TrainConfig())
    with torch.no_grad():
        next(iter(model.trained_parameters().values())).fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="learning_rate"):
        list(train.train(model, taught(engine, KEY), TrainConfig(), tmp_path / "c", 1e9, float))
