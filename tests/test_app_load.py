"""The limits of the prefix cache in a load, by configuration and memory."""

from typing import Any

import pytest
from msgspec import structs

from tinyoai import app, errors, wire
from tinyoai.config.resolve import resolve
from tinyoai.engine import facts
from tinyoai.models.managed_model import _settings, estimate
from tinyoai.models.registry import LastLoad, Model

GIB = 1 << 30
HPARAMS = facts.HParams(
    n_layer=2, n_embd=64, n_head=2, n_head_kv=2, n_ff=128, n_vocab=1000, n_key=128, n_value=128
)


MODEL = Model(
    name="m",
    path="/m.gguf",
    architecture="llama",
    engine="llamacpp",
    hparams=HPARAMS,
    n_ctx_train=2048,
    size=10**8,
)


def load(capacity: int = 64 * GIB, engine: str = "llamacpp", size: int = 10**8, **flags: Any) -> wire.Load:
    """Returns the load of a small model."""
    config = resolve({"home": "/nonexistent/home", **flags}, {})
    model = structs.replace(MODEL, engine=engine, size=size)
    return app._wire_load(config, capacity, "", model)


def test_an_eighth_of_the_memory_is_for_conversations_at_most_a_gibibyte() -> None:
    assert load(64 * GIB).cache_ram == GIB
    assert load(2 * GIB).cache_ram == GIB // 4
    # a model that fills the memory leaves nothing
    big = load(GIB, size=GIB)
    assert big.cache_ram == 0
    some = load(2 * GIB, size=2 * 10**9)
    assert 0 < some.cache_ram < 100 * 10**6


def test_it_counts_in_the_memory_that_a_model_takes() -> None:
    """Also where the last load has shown how much the rest takes."""
    with_cache, without = load(cache_ram="100M"), load(cache_ram="0")
    assert estimate(MODEL, with_cache).total == estimate(MODEL, without).total + (100 << 20)
    shown = LastLoad(settings=_settings(without), resident_bytes=10**9)
    known = structs.replace(MODEL, loaded=shown)
    assert estimate(known, without).total == 10**9
    assert estimate(known, with_cache).total == 10**9 + (100 << 20)


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
