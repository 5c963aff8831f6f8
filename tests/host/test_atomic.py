"""Replacing files: the file has the old content or the new, and no temporary file remains."""

import os
from pathlib import Path

import pytest

from tinyoai.host import atomic


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic.replacing(path, tmp_path / "part") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.replace

    def recorded_fsync(number: int) -> None:
        calls.append("fsync")
        fsync(number)

    def recorded_rename(old: Path, new: Path) -> None:
        calls.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_rename)
    atomic.replace(tmp_path / "file", b"data")
    assert calls == ["fsync", "rename", "fsync"]
    assert (tmp_path / "file").read_bytes() == b"data"
