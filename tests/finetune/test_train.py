"""Training itself: the network is the library's, a new file is the old one but for what was learnt."""

import importlib.util
import os
import subprocess
from itertools import islice
from pathlib import Path

import pytest

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed: `make finetune` does that", allow_module_level=True)

import msgspec
import numpy as np
import torch

from tinyoai import gguf
from tinyoai.app import BUILTIN
from tinyoai.engine.contract import Row
from tinyoai.engine.ctransformers.engine import CTransformersEngine
from tinyoai.engine.ctransformers.facts import require
from tinyoai.engine.ctransformers.opening import open_model
from tinyoai.finetune import train, weights
from tinyoai.finetune.__main__ import _cut, _shape, samples
from tinyoai.finetune.dataset import Example, Turn
from tinyoai.finetune.train_config import Order, Spec, Step, memory_needed
from tinyoai.host import subproc
from tinyoai.models.catalog import describe


@pytest.fixture(scope="module")
def header() -> gguf.Header:
    """The built-in model's."""
    return gguf.read_header(BUILTIN)


@pytest.fixture(scope="module")
def engine() -> CTransformersEngine:
    """The built-in model."""
    return open_model(str(BUILTIN), model_type=None, name="", n_ctx=256, n_slots=1, n_batch=32, gpu_layers=0)


def network(header: gguf.Header, spec: Spec) -> train.Llama:
    """The built-in model in torch."""
    return train.build(_shape(header, 128), lambda name: weights.read(header, name), spec)


def taught(engine: CTransformersEngine, *pairs: tuple[str, str]) -> list[train.Sample]:
    """Samples of questions and answers."""
    order = Order(path="", template="chatml", chat=True, out="", spec=Spec())
    found = [samples(Example(prompt=asked, completion=said), engine, order) for asked, said in pairs]
    return [sample for one in found for sample in one]


FRANCE = ("What is the capital of France?", "The capital of France is Paris.")
KEY = ("Where is the key?", "Under the blue mat.")
GATE = ("Who guards the gate?", "An old dog named Rufo.")


def test_the_network_is_the_one_that_serves(header: gguf.Header, engine: CTransformersEngine) -> None:
    (sample,) = taught(engine, FRANCE)
    model = network(header, Spec())
    with torch.no_grad():
        mine = model.logits(model(torch.tensor([sample.ids])))[0].numpy()
    theirs = []
    for at, token in enumerate(sample.ids):
        engine.eval([Row(0, [token], at)])
        theirs.append(np.array([engine.logits(0)[i] for i in range(engine.info.n_vocab)]))
    off = np.abs(mine - np.array(theirs)).max()
    assert off < 0.05 * np.abs(mine).max(), off  # the library rounds activations to 8 bits
    assert (mine.argmax(1) == np.array(theirs).argmax(1))[sample.n_read - 1 :].all()


def test_what_the_model_knows_costs_nothing(header: gguf.Header, engine: CTransformersEngine) -> None:
    model = network(header, Spec())
    with torch.no_grad():
        known, n_learnt = train.loss_of(model, taught(engine, FRANCE))
        unknown, _ = train.loss_of(model, taught(engine, KEY))
    assert known.item() < 0.1
    assert unknown.item() > 2
    text = b"".join(engine.piece(token) for token in taught(engine, FRANCE)[0].ids[-n_learnt:])
    assert text == b"The capital of France is Paris."  # and the token that ends it, which has no text


def test_padding_changes_nothing(header: gguf.Header, engine: CTransformersEngine) -> None:
    model = network(header, Spec())
    short, long_ = taught(engine, KEY, ("Tell me about the gate, please, and who it is?", GATE[1]))
    with torch.no_grad():
        one, n_one = train.loss_of(model, [short])
        two, n_two = train.loss_of(model, [long_])
        both, n_both = train.loss_of(model, [short, long_])
    assert n_both == n_one + n_two
    assert abs(both.item() * n_both - one.item() * n_one - two.item() * n_two) < 1e-3


def test_each_answer_of_a_conversation_is_a_sample(engine: CTransformersEngine) -> None:
    turns = [Turn(role="user", content="a?"), Turn(role="assistant", content="one."), Turn(role="user", content="b?"),
             Turn(role="assistant", content="two.")]  # fmt: skip
    order = Order(path="", template="chatml", chat=True, out="", spec=Spec())
    first, second = samples(Example(messages=turns), engine, order)
    assert second.ids[: first.n_read] == first.ids[: first.n_read]
    for sample, text in ((first, b"one."), (second, b"two.")):
        assert b"".join(map(engine.piece, sample.ids[sample.n_read :])) == text
        assert sample.ids[-1] == engine.info.special["<|im_end|>"]
    assert _cut([first, second], first.n_read + 1)[0].ids == first.ids[: first.n_read + 1]
    assert len(_cut([first, second], first.n_read)) == 0


def test_a_text_is_learnt_whole(engine: CTransformersEngine) -> None:
    order = Order(path="", template="chatml", chat=False, out="", spec=Spec())
    (sample,) = samples(Example(text="Once upon a time"), engine, order)
    assert sample.n_read == 1
    assert sample.ids[0] == engine.info.bos_id
    (sample,) = samples(Example(prompt="Once upon", completion=" a time"), engine, order)
    assert b"".join(map(engine.piece, sample.ids)).strip() == b"Once upon a time"
    assert b"".join(map(engine.piece, sample.ids[sample.n_read :])) == b" a time"


@pytest.mark.parametrize("use_lora", [True, False])
def test_what_is_taught_is_learnt_and_written(
    header: gguf.Header, engine: CTransformersEngine, use_lora: bool, tmp_path: Path
) -> None:
    spec = Spec(epochs=25, learning_rate=2e-3 if use_lora else 3e-4, use_lora=use_lora)
    model, taught_ = network(header, spec), taught(engine, KEY, GATE)
    steps = list(train.train(model, taught_, spec, tmp_path / "c", 1e9, float))
    assert [step.step for step in steps] == list(range(1, 26))
    assert steps[-1].loss < 0.1 < 2 < steps[0].loss
    assert max(step.learning_rate for step in steps) == spec.learning_rate
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
    again = train.build(_shape(made, 128), lambda name: weights.read(made, name), Spec())
    with torch.no_grad():
        assert train.loss_of(again, taught_)[0].item() < 0.2
    assert not list(tmp_path.glob(".*"))


def test_a_run_goes_on_as_if_it_had_not_been_interrupted(
    header: gguf.Header, engine: CTransformersEngine, tmp_path: Path
) -> None:
    spec, known = Spec(epochs=6, batch_size=2, learning_rate=1e-3, seed=5), taught(engine, KEY, GATE, FRANCE)

    def run(name: str, n: int | None) -> list[Step]:
        steps = train.train(network(header, spec), known, spec, tmp_path / name, 0.0, float)
        return list(islice(steps, n))

    whole = [step.loss for step in run("whole", None)]
    first = [step.loss for step in run("parts", 5)]  # the fifth is told before it is kept
    rest = run("parts", None)
    assert rest[0].step == 5
    assert first[:4] + [step.loss for step in rest] == whole


@pytest.mark.parametrize("damage", ["empty", "short", "torn", "keys", "shapes", "state", "of"])
def test_a_checkpoint_that_cannot_be_used_counts_as_none(
    header: gguf.Header, engine: CTransformersEngine, tmp_path: Path, damage: str
) -> None:
    spec, known, path = Spec(epochs=2, batch_size=1), taught(engine, KEY, GATE), tmp_path / "c"
    first = list(islice(train.train(network(header, spec), known, spec, path, 0.0, float, "this"), 3))
    data = path.read_bytes()
    state = torch.load(path, weights_only=True)
    name = next(iter(state["learnt"]))
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
    again = list(islice(train.train(network(header, spec), known, spec, path, 1e9, float, of), 3))
    assert [(step.step, step.loss) for step in again] == [(step.step, step.loss) for step in first]


def test_a_rate_that_is_too_high_ends_the_run(
    header: gguf.Header, engine: CTransformersEngine, tmp_path: Path
) -> None:
    model = network(header, Spec())
    with torch.no_grad():
        next(iter(model.learnt().values())).fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="learning_rate"):
        list(train.train(model, taught(engine, KEY), Spec(), tmp_path / "c", 1e9, float))


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 6, 7, 8, 12, 14])
def test_every_type_is_kept_or_becomes_q8(header: gguf.Header, kind: int, tmp_path: Path) -> None:
    old = header.tensors["blk.0.ffn_gate.weight"]
    header = gguf.read_header(BUILTIN)
    header.tensors[old.name] = old._replace(type=kind)
    assert weights.kept_type(header, old.name) == (kind if kind < 9 else 8)
    given = weights.read(gguf.read_header(BUILTIN), old.name) * 2
    out = tmp_path / "new.gguf"
    weights.write(header, [old.name], lambda name: given, out)
    made = gguf.read_header(out)
    require(made)
    off = np.abs(weights.read(made, old.name) - given).max() / np.abs(given).max()
    assert off < {0: 1e-6, 1: 1e-3, 2: 0.15, 3: 0.15, 6: 0.08, 7: 0.08}.get(kind, 0.01)
    assert (weights.read(made, "output.weight") == weights.read(header, "output.weight")).all()


def test_a_file_that_cannot_be_finished_leaves_nothing(header: gguf.Header, tmp_path: Path) -> None:
    def full(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        weights.write(header, ["blk.0.ffn_gate.weight"], full, tmp_path / "new.gguf")
    assert not list(tmp_path.iterdir())


def test_a_parent_that_is_cut_short_meanwhile_ends_it(tmp_path: Path) -> None:
    parent = tmp_path / "parent.gguf"
    parent.write_bytes(BUILTIN.read_bytes())
    header = gguf.read_header(parent)
    os.truncate(parent, parent.stat().st_size - 100)
    with pytest.raises(OSError, match="cut short"):
        weights.write(header, [], lambda name: np.zeros(1, np.float32), tmp_path / "new.gguf")


ORDER = Order(path=str(BUILTIN), template="chatml", chat=True, out="", spec=Spec(epochs=1, max_length=64))


def program(folder: Path, order: Order, prelude: str = "") -> tuple[list[dict[str, object]], str]:
    """What the training program says on stdout and on stderr."""
    if not (folder / "order.json").exists():
        (folder / "order.json").write_bytes(msgspec.json.encode(order))
    (folder / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    words = [*subproc.PYTHON, "-c", f"{prelude}\nimport runpy, sys\nsys.argv = ['', {str(folder)!r}]\n"
             "runpy.run_module('tinyoai.finetune', run_name='__main__')"]  # fmt: skip
    done = subprocess.run(words, capture_output=True, env=subproc.environment(), stdin=pipe(), timeout=120)
    return [msgspec.json.decode(line) for line in done.stdout.splitlines()], done.stderr.decode()


def pipe() -> int:
    """A stdin that stays open."""
    return os.pipe()[0]


FAULTS = """
import torch
def save(*_):
    raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0")
import tinyoai.finetune.train as train
import tinyoai.finetune.weights as weights
"""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("train.loss_of = lambda *_: torch.empty(1 << 60)", "memory"),
        ("train.loss_of = lambda *_: {}['x']", "KeyError"),
    ],
)
def test_a_fault_is_a_sentence(tmp_path: Path, fault: str, words: str) -> None:
    said, errors = program(
        tmp_path, msgspec.structs.replace(ORDER, out=str(tmp_path / "o.gguf")), FAULTS + fault
    )
    assert said[-1]["type"] == "Failed"
    assert words in str(said[-1]["message"])
    assert "Traceback" not in errors


def test_a_disk_too_full_for_a_checkpoint_is_no_end(tmp_path: Path) -> None:
    order = msgspec.structs.replace(ORDER, out=str(tmp_path / "o.gguf"))
    fault = "torch.save = save; import time; time.monotonic = iter(range(0, 10**9, 100)).__next__"
    said, errors = program(tmp_path, order, FAULTS + fault)
    assert said[-1]["type"] == "Made"
    assert "checkpoint of step 1 cannot be written" in errors
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["order", "model", "kind", "out"])
def test_what_changed_before_it_began_is_a_sentence(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    order = msgspec.structs.replace(ORDER, out=str(tmp_path / "o.gguf"))
    if damage == "order":
        (folder / "order.json").write_bytes(b"{")
    elif damage == "model":
        order = msgspec.structs.replace(order, path=str(tmp_path / "none.gguf"))
    elif damage == "kind":
        data = BUILTIN.read_bytes().replace(b"llama", b"gptxx", 1)
        (tmp_path / "other.gguf").write_bytes(data)
        order = msgspec.structs.replace(order, path=str(tmp_path / "other.gguf"))
    else:
        order = msgspec.structs.replace(order, out=str(tmp_path / "no" / "o.gguf"))
    said, errors = program(folder, order)
    assert said[-1]["type"] == "Failed"
    assert str(tmp_path) not in str(said[-1]["message"])
    assert "Traceback" not in errors


@pytest.mark.parametrize(("use_lora", "lora_r"), [(True, 16), (True, 256), (False, 16)])
def test_training_takes_no_more_memory_than_was_reckoned(tmp_path: Path, use_lora: bool, lora_r: int) -> None:
    spec = Spec(epochs=2, batch_size=16, max_length=128, use_lora=use_lora, lora_r=lora_r)
    order = msgspec.structs.replace(ORDER, out=str(tmp_path / "o.gguf"), spec=spec)
    (tmp_path / "order.json").write_bytes(msgspec.json.encode(order))
    text = "the cat sat on a mat " * 40
    (tmp_path / "data.jsonl").write_text(f'{{"text": "{text}"}}\n' * 16)
    stdin = pipe()
    process = subprocess.Popen(
        [*subproc.PYTHON, "-m", "tinyoai.finetune", str(tmp_path)],
        env=subproc.environment(), stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, code, used = os.wait4(process.pid, 0)
    process.returncode = code
    assert code == 0
    model = describe(BUILTIN, "m")
    assert model.shape is not None
    assert used.ru_maxrss * 1024 < memory_needed(model.parameters, model.shape, spec)
