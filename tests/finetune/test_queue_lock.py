"""The lock on the queue: it has one holder, and others can read the holder's pid."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyoai.finetune.queue_lock import FILE, QueueHeld, QueueLock


def test_one_holds_the_queue_until_it_releases_it(tmp_path: Path) -> None:
    first, second = QueueLock(), QueueLock()
    first.acquire(tmp_path)
    first.acquire(tmp_path)
    with pytest.raises(QueueHeld) as caught:
        second.acquire(tmp_path)
    assert (first.held, second.held, caught.value.pid) == (True, False, str(os.getpid()))
    first.release()
    first.release()
    second.acquire(tmp_path)
    assert (first.held, second.held) == (False, True)
    second.release()


def test_a_shorter_pid_replaces_a_longer_one(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("99999999999\n")
    lock = QueueLock()
    lock.acquire(tmp_path)
    assert (tmp_path / FILE).read_text() == f"{os.getpid()}\n"
    lock.release()


def test_children_do_not_inherit_the_lock(tmp_path: Path) -> None:
    lock = QueueLock()
    lock.acquire(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        lock.release()
        again = QueueLock()
        again.acquire(tmp_path)
        again.release()
        child.kill()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / FILE).symlink_to(tmp_path / "other")
    with pytest.raises(OSError):
        QueueLock().acquire(tmp_path)
    assert not (tmp_path / "other").exists()
