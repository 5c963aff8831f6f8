"""Finds the real clients that `make conformance` installs, each in a virtual environment of its own."""

import os
from pathlib import Path

import pytest

from tests.serving import environment

ROOT = Path(__file__).parent.parent
PLACE = ROOT / ".venv-conformance"
INSTALL = "run `make conformance` to install it"

_QUIET = {
    "DO_NOT_TRACK": "1",
    "ANONYMIZED_TELEMETRY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
}


def python(name: str) -> str:
    """The Python that has a client installed; without it the test is skipped."""
    found = PLACE / name / "bin" / "python"
    if not (PLACE / name / ".installed").exists():
        pytest.skip(f"{name} is not installed: {INSTALL}")
    return str(found)


def node_modules() -> str:
    """The folder with OpenAI's SDK for Node; without it the test is skipped."""
    if not (PLACE / "node" / ".installed").exists():
        pytest.skip(f"OpenAI's SDK for Node is not installed: install node and npm, then {INSTALL}")
    return str(PLACE / "node" / "node_modules")


def quiet_environment(**extra: str) -> dict[str, str]:
    """The environment for a client: telemetry and downloads are off, the user's own settings are gone."""
    kept = {
        k: v for k, v in environment().items() if not k.startswith(("OPENAI_", "LANGCHAIN_", "LANGSMITH_"))
    }
    return {**kept, **_QUIET, **{k: os.fspath(v) for k, v in extra.items()}}
