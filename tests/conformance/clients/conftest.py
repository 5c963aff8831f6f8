"""Collects each folder here only in the virtual environment of that client."""

import sys
from pathlib import Path

from tests.clients import PLACE

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Returns True for a client's tests in any environment but that client's own."""
    folder = collection_path.relative_to(HERE).parts[:1]
    mine = Path(sys.prefix)
    if folder and (HERE / folder[0]).is_dir() and (mine.parent, mine.name) != (PLACE, folder[0]):
        return True
    return None
