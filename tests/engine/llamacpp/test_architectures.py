"""The table of model families against llama.cpp's own."""

import re

from tests import fixtures
from tinyoai.engine.llamacpp.architectures import DECODERS, ENCODERS, REFUSED

NEWER = {"gemma-embedding2", "k2-horizon"}
"""Families of the prebuilt library, which is newer than the source package that this test reads."""
NO_MODELS = {"(unknown)", "gptj"}
"""Names without code behind them."""


def test_every_family_of_llama_cpp_is_known() -> None:
    source = fixtures.require(fixtures.llama_arch(), "llama-arch.cpp").read_text()
    table = source[source.index("LLM_ARCH_NAMES") : source.index("LLM_KV_NAMES")]
    names = set(re.findall(r'\{\s*LLM_ARCH_\w+,\s*"([^"]+)"', table))
    assert len(names) > 100
    assert names - NO_MODELS == (DECODERS | ENCODERS | set(REFUSED)) - NEWER


def test_a_family_is_of_one_kind() -> None:
    assert not DECODERS & ENCODERS
    assert not (DECODERS | ENCODERS) & set(REFUSED)
