"""A new model file equals the old one except for the matrices that changed."""

import importlib.util
import os
from pathlib import Path

import pytest

if importlib.util.find_spec("gguf") is None:
    pytest.skip("gguf is not installed: `make finetune` does that", allow_module_level=True)

import numpy as np

from tests.finetune.builtin import BUILTIN
from tinyoai import gguf
from tinyoai.engine.ctransformers.facts import require
from tinyoai.finetune import weights


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 6, 7, 8, 12, 14])
def test_every_type_is_kept_or_becomes_q8(header: gguf.Header, kind: int, tmp_path: Path) -> None:
    old = header.tensors["blk.0.ffn_gate.weight"]
    header = gguf.read_header(BUILTIN)
    header.tensors[old.name] = old._replace(type=kind)
    assert weights.written_type(header, old.name) == (kind if kind < 9 else 8)
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


def test_a_parent_that_is_truncated_meanwhile_is_an_error(tmp_path: Path) -> None:
    parent = tmp_path / "parent.gguf"
    parent.write_bytes(BUILTIN.read_bytes())
    header = gguf.read_header(parent)
    os.truncate(parent, parent.stat().st_size - 100)
    with pytest.raises(OSError, match="truncated"):
        weights.write(header, [], lambda name: np.zeros(1, np.float32), tmp_path / "new.gguf")
