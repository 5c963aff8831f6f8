"""Memory of processes, of the machine and of its cgroups."""

import os
from pathlib import Path

import pytest

from tinyoai.host import memory


def test_the_memory_of_a_process() -> None:
    block = bytearray(32 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert memory.unshared(os.getpid()) > len(block)
    assert memory.resident(os.getpid()) > len(block)
    assert memory.unshared(2**22 + 1) == memory.resident(2**22 + 1) == 0


def group(folder: Path, files: dict[str, str]) -> None:
    """Writes a cgroup's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_cgroups_of_both_versions_and_all_levels_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, real = tmp_path / "cgroup", Path.read_text
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(memory, "_machine", lambda: 10**9)
    monkeypatch.setattr(
        Path, "read_text", lambda self: real(proc if str(self) == "/proc/self/cgroup" else self)
    )
    stat = "anon 1\ninactive_file 30\nactive_file 20\nshmem 7\n"
    group(tmp_path / "fs/a/b", {"memory.max": "max\n", "memory.current": "5", "memory.stat": stat})
    group(tmp_path / "fs/a", {"memory.max": "1000\n", "memory.current": "400", "memory.stat": stat})
    proc.write_text("0::/a/b\n")
    assert [free for free in memory._each_cgroup(memory._free) if free is not None] == [1000 - 400 + 50]
    assert memory.available() == 650

    old = "total_inactive_file 1\ntotal_active_file 2\ninactive_file 99\n"
    group(
        tmp_path / "fs/memory/c",
        {"memory.limit_in_bytes": "100", "memory.usage_in_bytes": "150", "memory.stat": old},
    )
    proc.write_text("9:name=systemd:/\n4:cpu,memory:/c\n0::/\n")
    assert memory.available() == 0  # over its limit: 0, not negative

    proc.write_text("0::/not/there\nnonsense\n")
    assert not any(memory._each_cgroup(memory._free))
    assert memory.available() == 10**9  # the machine's
