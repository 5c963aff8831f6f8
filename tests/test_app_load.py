"""The limits of the prefix cache in a load, by configuration and memory."""

from typing import Any

import pytest

from tinyoai import app, errors, wire
from tinyoai.config.resolve import resolve
from tinyoai.engine import facts
from tinyoai.models.registry import Model

GIB = 1 << 30
HPARAMS = facts.HParams(
    n_layer=2, n_embd=64, n_head=2, n_head_kv=2, n_ff=128, n_vocab=1000, n_key=128, n_value=128
)


def load(capacity: int = 64 * GIB, engine: str = "llamacpp", size: int = 10**8, **flags: Any) -> wire.Load:
    """Returns the load of a small model."""
    config = resolve({"home": "/nonexistent/home", **flags}, {})
    model = Model(
        name="m",
        path="/m.gguf",
        architecture="llama",
        engine=engine,
        hparams=HPARAMS,
        n_ctx_train=2048,
        size=size,
    )
    return app._wire_load(config, capacity, "", model)


def test_an_eighth_of_the_memory_is_for_conversations_at_most_a_gibibyte() -> None:
    assert load(64 * GIB).cache_ram == GIB
    assert load(2 * GIB).cache_ram == GIB // 4
    # a model that fills the memory leaves nothing
    big = load(GIB, size=GIB)
    assert big.cache_ram == 0
    some = load(2 * GIB, size=2 * 10**9)
    assert 0 < some.cache_ram < 100 * 10**6


def test_the_flags_decide() -> None:
    found = load(cache_ram="100M", cache_disk="3G")
    assert (found.cache_ram, found.cache_disk) == (100 << 20, 3 << 30)
    assert found.cache_dir == "/nonexistent/home/prefix-cache"
    none = load(cache_ram="0", cache_disk="0")
    assert (none.cache_ram, none.cache_disk, none.cache_dir) == (0, 0, "")
    for name in ("cache_ram", "cache_disk"):
        with pytest.raises(errors.UsageError, match=f"--{name.replace('_', '-')}: 'much'"):
            load(**{name: "much"})


def test_an_engine_that_saves_nothing_gets_no_cache() -> None:
    found = load(engine="ctransformers")
    assert (found.cache_ram, found.cache_disk, found.cache_dir) == (0, 0, "")
