"""Fixtures of the command tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import Place
from tinyoai.cli import agent
from tinyoai.host import instances


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A new data directory. Its agent is killed at the end of the test."""
    made = Place(tmp_path / "home")
    try:
        yield made
    finally:
        record = agent.read_record(made.home)
        if record is not None and agent.current(made.home) is not None:
            os.kill(record.process.pid, signal.SIGKILL)
            made.wait(lambda: not instances.alive(record.process))
