"""Runs the C tests: as shipped, without AVX2, and under the sanitizers."""

import subprocess
from pathlib import Path

import pytest

from tests.csrc.programs import FLAVOURS, FUZZ_TARGETS, compile_program


def _run(*command: str | Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", ["test_sampler", "test_stop_matcher", "test_hooks"])
def test_program(name: str, flavour: str, tmp_path: Path) -> None:
    _run(compile_program(name, flavour, tmp_path))


@pytest.mark.parametrize("name", FUZZ_TARGETS)
def test_fuzz_target_on_fixed_inputs(name: str, tmp_path: Path) -> None:
    _run(compile_program(name, "sanitized", tmp_path), "1", "0", "1500")
