"""Locks: one process at a time."""

import fcntl
import os
from pathlib import Path

import pytest

from tinyoai.errors import UsageError
from tinyoai.host import file_lock


def test_a_held_lock_excludes_others_until_its_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with file_lock.held(path):
        other = os.open(path, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_an_error_in_the_block_releases_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(ZeroDivisionError), file_lock.held(path):
        raise ZeroDivisionError
    with open(path) as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_cannot_be_created_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="cannot write"), file_lock.held(tmp_path / "lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()
