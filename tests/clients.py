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
    """Returns the Python interpreter of a client's environment. Skips the test if it is not installed."""
    found = PLACE / name / "bin" / "python"
    if not (PLACE / name / ".installed").exists():
        pytest.skip(f"{name} is not installed: {INSTALL}")
    return str(found)


def node_modules() -> str:
    """Returns the folder with OpenAI's SDK for Node. Skips the test if it is not installed."""
    if not (PLACE / "node" / ".installed").exists():
        pytest.skip(f"OpenAI's SDK for Node is not installed: install node and npm, then {INSTALL}")
    return str(PLACE / "node" / "node_modules")


def quiet_environment(**extra: str) -> dict[str, str]:
    """Returns an environment for a client: no telemetry, no downloads, none of the user's settings."""
    kept = {
        k: v for k, v in environment().items() if not k.startswith(("OPENAI_", "LANGCHAIN_", "LANGSMITH_"))
    }
    return {**kept, **_QUIET, **{k: os.fspath(v) for k, v in extra.items()}}
