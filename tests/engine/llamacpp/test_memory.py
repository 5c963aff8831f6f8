"""The estimate of a load against what a worker really takes, and headers with flipped bits in the real library."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import architectures, fixtures
from tests.engine import bit_flips
from tests.engines import make
from tinyoai import gguf, wire
from tinyoai.engine.llamacpp import facts


@pytest.fixture(autouse=True)
def library() -> None:
    """Without the library the tests are skipped, or fail with CI=true."""
    if not facts.installed():
        fixtures.absent("xllamacpp is not installed: run `make test`")


MEASURE = """
import json, re, sys
import numpy, tinyoai.engine.__main__
from tinyoai import wire
from tinyoai.engine.contract import Row, Want
from tinyoai.engine.opening import open_engine
load = wire.Load(**json.loads(sys.argv[1]))
engine = open_engine(load)
if engine.caps.whole_rows:
    engine.eval([Row(0, [5 + i % 50 for i in range(engine.caps.n_row)], 0, Want.EMBEDDING)])
else:
    for slot in range(load.n_slots):
        for at in range(0, 2 * load.n_batch, load.n_batch):
            engine.eval([Row(slot, [5 + i % 50 for i in range(load.n_batch)], at)])
    engine.eval([Row(slot, [5], 2 * load.n_batch, Want.LAST) for slot in range(load.n_slots)])
most = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
mapped, here = 0, False
for line in open("/proc/self/smaps"):
    if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
        here = line.rstrip().endswith(load.path)
    elif here and line.startswith("Rss:"):
        mapped += int(line.split()[1]) * 1024
print(json.dumps([most, mapped]))
"""


def measured(path: Path, **fields: Any) -> tuple[int, int]:
    """The most that a worker with full slots takes with the whole file in memory, and the estimate; in bytes."""
    values = {
        "path": str(path),
        "name": "m",
        "engine": "llamacpp",
        "n_ctx": 512,
        "n_slots": 4,
        "n_batch": 64,
    } | fields
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(values)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    most, mapped = json.loads(done.stdout)
    header = gguf.read_header(path)
    estimate = facts.estimate(facts.hparams(header), header.file_size, wire.Load(**values))
    return most - mapped + (header.file_size if mapped else 0), estimate.total


def check(path: Path, **fields: Any) -> None:
    """Asserts that the estimate is never below, and above by at most 15 % or 30 MB."""
    taken, estimate = measured(path, **fields)
    assert taken <= estimate <= taken + max(0.15 * taken, 30e6), (taken / 1e6, estimate / 1e6)


@pytest.mark.parametrize("cache", ["f16", "q8_0", "q4_0"])
def test_smollm2_by_cache_type(cache: str) -> None:
    check(fixtures.require(fixtures.smollm2()), n_ctx=1024, cache_type_k=cache, cache_type_v=cache)


@pytest.mark.parametrize("change", [{"flash_attn": "off"}, {"mmap": False}, {"n_slots": 1}])
def test_smollm2_with_other_settings(change: dict[str, Any]) -> None:
    check(fixtures.require(fixtures.smollm2()), **change)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "falcon-h1", "bert", "qwen2-embed"]
)
def test_every_family(name: str) -> None:
    check(architectures.model(name))


TRY = """
import sys
from tinyoai import wire
from tinyoai.engine.contract import EngineError, Row
from tinyoai.engine.opening import open_engine
ran = 0
for path in sys.argv[1:]:
    try:
        engine = open_engine(wire.Load(path=path, name="m", engine="llamacpp", n_ctx=64, n_slots=1, n_threads=1))
        engine.eval([Row(0, [5, 6, 7], 0)])
        engine.close()
        ran += 1
    except EngineError as error:
        assert "Traceback" not in str(error)
print(ran)
"""


def test_bit_flips_in_the_header_crash_nobody(tmp_path: Path) -> None:
    sound = make.llama(tmp_path / "sound.gguf", n_embd=32, n_ff=64, n_layer=1)
    accepted = bit_flips.accepted(sound, tmp_path, facts.supports, n=400, seed=3)
    assert 50 < len(accepted) < 300
    done = subprocess.run(
        [sys.executable, "-c", TRY, *accepted[:50]], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 30
