"""`make run` on a machine where something is missing: one sentence with the remedy."""

import os
import shutil
import subprocess
import sys
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


def planned(clone: Path, *arguments: str) -> str:
    """The commands that `make run` would run."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "LLAMACPP"))}
    done = subprocess.run(
        ["make", "-n", "run", *arguments],
        cwd=clone, env=env, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout


def test_make_run_installs_llama_cpp_unless_told_not_to(clone: Path) -> None:
    assert ".ci/llamacpp" in planned(clone)
    assert ".ci/llamacpp" not in planned(clone, "LLAMACPP=0")


def test_without_a_wheel_make_run_goes_on_without_llama_cpp(clone: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", clone / ".venv"], check=True, timeout=120)
    (clone / ".venv" / ".made").touch()
    os.utime(clone / "pyproject.toml", (0, 0))
    unreachable = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(clone)}
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PIP_", "PYTHONPATH", "LLAMACPP"))
    }
    done = subprocess.run(
        ["make", ".venv/.installed-llamacpp"],
        cwd=clone, env=env | unreachable, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert [line.partition(" ")[0] for line in said] == ["installing", "llama.cpp"]
    assert "MB" in said[0]
    assert "make llamacpp" in said[1]
    # the next call tries again
    assert not (clone / ".venv" / ".installed-llamacpp").exists()
