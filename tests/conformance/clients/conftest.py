"""Collects each folder here in the virtual environment of its name alone."""

import sys
from pathlib import Path

from tests.clients import PLACE

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """True for a client's tests in an environment of another client, or of none."""
    folder = collection_path.relative_to(HERE).parts[:1]
    mine = Path(sys.prefix)
    if folder and (HERE / folder[0]).is_dir() and (mine.parent, mine.name) != (PLACE, folder[0]):
        return True
    return None
