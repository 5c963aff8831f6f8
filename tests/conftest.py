"""Servers that many tests share: the built-in model, and the scripted engine."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.serving import Server, serve

with contextlib.suppress(ImportError):  # the environments of the clients have none
    import hypothesis

    # the time of an example depends on the machine
    hypothesis.settings.register_profile("tinyoai", deadline=None)
    hypothesis.settings.load_profile("tinyoai")


@pytest.fixture(scope="session")
def builtin() -> Iterator[Server]:
    """The server with its default model and no flags."""
    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def fake() -> Iterator[Server]:
    """A server with the scripted engine, which repeats the message."""
    with serve("--engine", "fake", "--log-level", "error") as server:
        yield server
