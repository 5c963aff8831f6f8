"""Fixtures of the fine-tuning tests: the built-in model's header and engine."""

from collections.abc import Iterator

import pytest

from tests.finetune.builtin import BUILTIN
from tinyoai import gguf
from tinyoai.engine.ctransformers.engine import CTransformersEngine
from tinyoai.engine.ctransformers.opening import open_model


@pytest.fixture(scope="package")
def header() -> gguf.Header:
    """The header of the built-in model."""
    return gguf.read_header(BUILTIN)


@pytest.fixture(scope="package")
def engine() -> Iterator[CTransformersEngine]:
    """An engine of the built-in model."""
    engine = open_model(
        str(BUILTIN), model_type=None, name="", n_ctx=256, n_slots=1, n_batch=32, gpu_layers=0
    )
    yield engine
    engine.close()
