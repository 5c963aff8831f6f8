"""The training process: it ends with one clear sentence after any fault."""

import fcntl
import importlib.util
import os
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed: `make finetune` does that", allow_module_level=True)

from tests.finetune.builtin import BUILTIN
from tests.finetune.program import SPEC, pipe, program
from tinyoai.finetune.__main__ import run_id
from tinyoai.host import subproc

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
def test_a_fault_is_one_sentence(tmp_path: Path, fault: str, words: str) -> None:
    said, errors = program(
        tmp_path, msgspec.structs.replace(SPEC, out=str(tmp_path / "o.gguf")), FAULTS + fault
    )
    assert said[-1]["type"] == "Failed"
    assert words in str(said[-1]["message"])
    assert "Traceback" not in errors


def test_training_survives_a_disk_too_full_for_a_checkpoint(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPEC, out=str(tmp_path / "o.gguf"))
    fault = "torch.save = save; import time; time.monotonic = iter(range(0, 10**9, 100)).__next__"
    said, errors = program(tmp_path, spec, FAULTS + fault)
    assert said[-1]["type"] == "Made"
    assert "checkpoint of step 1 cannot be written" in errors
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["spec", "model", "kind", "out"])
def test_files_damaged_before_the_start_are_one_sentence(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    spec = msgspec.structs.replace(SPEC, out=str(tmp_path / "o.gguf"))
    if damage == "spec":
        (folder / "order.json").write_bytes(b"{")
    elif damage == "model":
        spec = msgspec.structs.replace(spec, path=str(tmp_path / "none.gguf"))
    elif damage == "kind":
        data = BUILTIN.read_bytes().replace(b"llama", b"gptxx", 1)
        (tmp_path / "other.gguf").write_bytes(data)
        spec = msgspec.structs.replace(spec, path=str(tmp_path / "other.gguf"))
    else:
        spec = msgspec.structs.replace(spec, out=str(tmp_path / "no" / "o.gguf"))
    said, errors = program(folder, spec)
    assert said[-1]["type"] == "Failed"
    assert str(tmp_path) not in str(said[-1]["message"])
    assert "Traceback" not in errors


def test_a_checkpoint_of_version_0_1_belongs_to_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"12345")
    os.utime(path, ns=(0, 1_700_000_000_000_000_001))
    spec = msgspec.structs.replace(SPEC, path=str(path))
    assert run_id(spec) == (
        "5:1700000000000000001:Spec(epochs=1, batch_size=4, learning_rate=0.0002, use_lora=True, lora_r=16, "
        "lora_alpha=32, max_length=64, seed=0)"
    )


def test_a_process_waits_until_the_previous_one_has_exited(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPEC, out=str(tmp_path / "o.gguf"))
    (tmp_path / "order.json").write_bytes(msgspec.json.encode(spec))
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    words = [*subproc.PYTHON, "-m", "tinyoai.finetune", str(tmp_path)]
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            words, env=subproc.environment(), stdin=pipe(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        waiting = f"{os.stat(tmp_path / 'lock').st_ino} "
        deadline = time.monotonic() + 60
        while not any(
            "-> FLOCK" in line and f":{waiting}" in line
            for line in Path("/proc/locks").read_text().splitlines()
        ):
            assert process.poll() is None
            assert time.monotonic() < deadline, "the process must wait for the lock"
            time.sleep(0.05)
    events, _ = process.communicate(timeout=120)
    assert msgspec.json.decode(events.splitlines()[-1])["type"] == "Made"
