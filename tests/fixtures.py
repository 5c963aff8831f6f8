"""Files of other projects that tests use, in a cache folder outside the repository."""

import os
from pathlib import Path


def _root() -> Path:
    return Path(os.environ.get("TINYOAI_FIXTURES") or Path.home() / ".cache" / "tinyoai-fixtures")


def templates_dir() -> Path | None:
    """The folder of llama.cpp's chat templates; None if it is not there."""
    folder = _root() / "llama.cpp" / "models" / "templates"
    return folder if folder.is_dir() else None
