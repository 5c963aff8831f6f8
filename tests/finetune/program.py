"""Runs the training process on a small job."""

import os
import subprocess
from pathlib import Path

import msgspec

from tests.finetune.builtin import BUILTIN
from tinyoai.finetune.protocol import JobSpec
from tinyoai.finetune.train_config import TrainConfig
from tinyoai.host import subproc

SPEC = JobSpec(
    path=str(BUILTIN), template="chatml", chat=True, out="", config=TrainConfig(epochs=1, max_length=64)
)


def program(folder: Path, spec: JobSpec, prelude: str = "") -> tuple[list[dict[str, object]], str]:
    """Runs a job's process. Returns its events and its stderr."""
    if not (folder / "order.json").exists():
        (folder / "order.json").write_bytes(msgspec.json.encode(spec))
    (folder / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    words = [*subproc.PYTHON, "-c", f"{prelude}\nimport runpy, sys\nsys.argv = ['', {str(folder)!r}]\n"
             "runpy.run_module('tinyoai.finetune', run_name='__main__')"]  # fmt: skip
    done = subprocess.run(words, capture_output=True, env=subproc.environment(), stdin=pipe(), timeout=120)
    return [msgspec.json.decode(line) for line in done.stdout.splitlines()], done.stderr.decode()


def pipe() -> int:
    """Returns a stdin that stays open."""
    return os.pipe()[0]
