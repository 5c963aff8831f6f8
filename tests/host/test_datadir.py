"""The data directory's location and the files in it."""

from pathlib import Path

import pytest

from tinyoai.errors import UsageError
from tinyoai.host import datadir


def test_home_wins_and_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
    assert datadir.folder("here") == tmp_path / "here"
    assert datadir.folder("") == Path("/xdg/tinyoai")


def test_a_relative_xdg_path_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "xdg")
    monkeypatch.setenv("HOME", "/home/someone")
    assert datadir.folder("") == Path("/home/someone/.local/share/tinyoai")


def test_a_user_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Path:
        raise RuntimeError

    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fails)
    with pytest.raises(UsageError, match="--home"):
        datadir.folder("")


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    datadir.write(path, b"old")
    path.chmod(0o644)
    datadir.write(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_created_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"cannot write .*; choose another folder with --home"):
        datadir.write(tmp_path / "file" / "x", b"")
