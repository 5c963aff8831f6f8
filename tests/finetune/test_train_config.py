"""The memory estimate of training."""

import importlib.util
import re
import subprocess
import time
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
    most = 0  # not rusage: its peak begins with that of this process, which has tested other things
    while process.poll() is None:
        found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        most = max(most, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    assert process.returncode == 0
    model = describe(BUILTIN, "m")
    assert model.hparams is not None
    needed = memory_needed(model.n_params, model.hparams, config)
    assert needed / 3 < most < needed, (most, needed)
