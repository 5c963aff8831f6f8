"""`make run` on a machine where something is missing: one sentence with the remedy."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the files that `make run` reads first."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    return tmp_path


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"CC": "/nowhere/cc"}, "apt install gcc"),
        ({"PYTHON": "/nowhere/python"}, "needs Python 3.11, 3.12 or 3.13"),
        ({"PYTHON": "/bin/false"}, "needs Python 3.11, 3.12 or 3.13"),
    ],
)
def test_make_run_says_what_is_missing(clone: Path, variables: dict[str, str], words: str) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", "run"],
        cwd=clone,
        env=env | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
    assert len(said) == 1
    assert words in said[0]
    assert not (clone / ".venv").exists()
