"""The estimate of a model's memory, held against real workers; and what is read of the machine and its cgroups."""

import os
import threading
from pathlib import Path

import pytest

from tests.engines import make
from tests.serving import serve
from tinyoai import wire
from tinyoai.models import memory
from tinyoai.models.catalog import describe
from tinyoai.models.memory import Need


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
        memory.need(model, wire.Load(path="", name="m", engine="", n_ctx=n, n_slots=2)) for n in (100, 200)
    )
    assert small.fixed == large.fixed > model.size
    # at least two F16 numbers of the model's width for each layer, position and slot
    assert large.total - small.total >= 100 * 2 * 3 * 64 * 2 * 2


def test_the_largest_context_fits_and_the_next_block_does_not() -> None:
    need = Need(fixed=1000, per_token=10, n_ctx=4096)
    assert need.largest_context(1000 + 10 * 100) == 96
    assert need.largest_context(1000 + 10 * 96) == 96
    assert need.largest_context(1000 + 10 * 96 - 1) == 64
    assert need.largest_context(999) == 0
    assert Need(fixed=1000, per_token=0, n_ctx=0).largest_context(10**9) == 0


def test_what_a_process_holds() -> None:
    block = bytearray(32 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert memory.held(os.getpid()) > len(block)
    assert memory.resident(os.getpid()) > len(block)
    assert memory.held(2**22 + 1) == memory.resident(2**22 + 1) == 0


def group(folder: Path, files: dict[str, str]) -> None:
    """A cgroup's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_cgroups_of_both_versions_and_all_levels_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, real = tmp_path / "cgroup", Path.read_text
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(
        Path, "read_text", lambda self: real(proc if str(self) == "/proc/self/cgroup" else self)
    )
    stat = "anon 1\ninactive_file 30\nactive_file 20\nshmem 7\n"
    group(tmp_path / "fs/a/b", {"memory.max": "max\n", "memory.current": "5", "memory.stat": stat})
    group(tmp_path / "fs/a", {"memory.max": "1000\n", "memory.current": "400", "memory.stat": stat})
    proc.write_text("0::/a/b\n")
    assert [room for room in memory._cgroup() if room is not None] == [1000 - 400 + 50]
    assert memory.available() == 650

    old = "total_inactive_file 1\ntotal_active_file 2\ninactive_file 99\n"
    group(
        tmp_path / "fs/memory/c",
        {"memory.limit_in_bytes": "100", "memory.usage_in_bytes": "150", "memory.stat": old},
    )
    proc.write_text("9:name=systemd:/\n4:cpu,memory:/c\n0::/\n")
    assert memory.available() == 0  # over its limit: nothing is left, not less than nothing

    proc.write_text("0::/not/there\nnonsense\n")
    assert not any(memory._cgroup())
    assert memory.available() == memory._machine()
