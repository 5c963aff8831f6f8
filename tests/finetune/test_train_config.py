"""The memory estimate of training."""

import importlib.util
import os
import subprocess
from pathlib import Path

import msgspec
import pytest

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed: `make finetune` does that", allow_module_level=True)

from tests.finetune.builtin import BUILTIN
from tests.finetune.program import SPEC, pipe
from tinyoai.finetune.train_config import TrainConfig, memory_needed
from tinyoai.host import subproc
from tinyoai.models.catalog import describe


@pytest.mark.parametrize(("use_lora", "lora_r"), [(True, 16), (True, 256), (False, 16)])
def test_training_takes_no_more_memory_than_is_estimated(tmp_path: Path, use_lora: bool, lora_r: int) -> None:
    config = TrainConfig(epochs=2, batch_size=16, max_length=128, use_lora=use_lora, lora_r=lora_r)
    spec = msgspec.structs.replace(SPEC, out=str(tmp_path / "o.gguf"), config=config)
    (tmp_path / "order.json").write_bytes(msgspec.json.encode(spec))
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
    assert model.hparams is not None
    assert used.ru_maxrss * 1024 < memory_needed(model.n_params, model.hparams, config)
