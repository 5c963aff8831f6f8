"""The estimate of a model's memory, held against real workers."""

import threading
from pathlib import Path

import pytest

from tests.engines import make
from tests.serving import serve
from tinyoai import wire
from tinyoai.models.catalog import describe
from tinyoai.models.memory_estimate import Need, need


@pytest.mark.parametrize("batch", [32, 256])
def test_a_worker_with_full_slots_stays_within_its_estimate(tmp_path: Path, batch: int) -> None:
    path = make.llama(tmp_path / "m.gguf", n_layer=4, n_embd=256, n_head=4, n_ff=512, n_ctx=2048)
    with serve("--model", str(path), "--batch-size", str(batch)) as server:

        def fill(first: int) -> None:
            ids = [(first + i * 7) % 400 + 10 for i in range(2000)]
            reply = server.post("/v1/completions", model="m", prompt=ids, max_tokens=40, ignore_eos=True)
            assert reply.json["usage"]["total_tokens"] == 2040

        threads = [threading.Thread(target=fill, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (status,) = server.get("/v1/models/status").json["data"]
        held, estimated = status["memory"]["resident_bytes"], status["memory"]["estimated_bytes"]
        assert status["answers"] == 4
        assert path.stat().st_size < held <= estimated < 2 * held


def test_an_estimate_is_of_the_file_the_cache_and_scratch(tmp_path: Path) -> None:
    model = describe(make.llama(tmp_path / "m.gguf", n_layer=3, n_embd=64, n_head=4), "m")
    small, large = (
        need(model, wire.Load(path="", name="m", engine="", n_ctx=n, n_slots=2)) for n in (100, 200)
    )
    assert small.fixed == large.fixed > model.size
    # at least two F16 numbers of the model's width for each layer, position and slot
    assert large.total - small.total >= 100 * 2 * 3 * 64 * 2 * 2


def test_the_largest_context_fits_and_the_next_block_does_not() -> None:
    one = Need(fixed=1000, per_token=10, n_ctx=4096)
    assert one.largest_context(1000 + 10 * 100) == 96
    assert one.largest_context(1000 + 10 * 96) == 96
    assert one.largest_context(1000 + 10 * 96 - 1) == 64
    assert one.largest_context(999) == 0
    assert Need(fixed=1000, per_token=0, n_ctx=0).largest_context(10**9) == 0
