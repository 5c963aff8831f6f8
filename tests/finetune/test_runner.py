"""The child process: its events in order, and its exit."""

import asyncio
import contextlib
import os
import sys
from pathlib import Path

import pytest

from tinyoai.finetune import runner
from tinyoai.finetune.protocol import Finished, ProgressEvent, TrainingFailed
from tinyoai.finetune.runner import TrainingProcess, describe_exit
from tinyoai.host import subproc


def script(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> TrainingProcess:
    """Makes the child run this script instead of the training program."""
    monkeypatch.setattr(subproc, "PYTHON", (sys.executable, "-c", text))
    return TrainingProcess(folder, folder / "log.txt")


def test_events_come_in_order_and_other_lines_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = script(
        tmp_path, monkeypatch,
        "import sys; print('{\"type\": \"Failed\", \"message\": \"a\"}\\nnoise\\n{}\\n{\"type\": \"Made\", \"size\": 1}', end='')\n"
        "print('to the log', file=sys.stderr); sys.exit(3)",
    )  # fmt: skip
    events: list[ProgressEvent] = []

    async def on_event(event: ProgressEvent) -> None:
        await asyncio.sleep(0)
        events.append(event)

    assert asyncio.run(process.run(on_event)) == 3
    assert events == [TrainingFailed(message="a"), Finished(size=1)]
    assert (tmp_path / "log.txt").read_text() == "to the log\n"


READY = 'import os, sys, time; print(\'{"type": "Made", "size": %d}\' % os.getpid(), flush=True)\n'


def test_a_process_that_does_not_exit_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "STOP_S", 0.01)
    process = script(tmp_path, monkeypatch, READY + "time.sleep(600)")

    async def on_event(event: ProgressEvent) -> None:
        process.stop()

    assert asyncio.run(process.run(on_event)) == -9


def test_a_process_that_exits_when_stdin_closes_is_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "STOP_S", 600)
    process = script(tmp_path, monkeypatch, READY + "sys.stdin.read(); sys.exit(4)")

    async def on_event(event: ProgressEvent) -> None:
        process.stop()

    assert asyncio.run(process.run(on_event)) == 4


@pytest.mark.parametrize("fault", [True, False])
def test_no_process_outlives_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: bool) -> None:
    process, pids = script(tmp_path, monkeypatch, READY + "time.sleep(600)"), list[int]()

    async def test() -> None:
        async def on_event(event: ProgressEvent) -> None:
            assert isinstance(event, Finished)
            pids.append(event.size)
            if fault:
                raise OSError("the disk is full")
            task.cancel()

        task = asyncio.ensure_future(process.run(on_event))
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await task

    asyncio.run(test())
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_an_exit_without_a_result_is_described() -> None:
    assert describe_exit(1, ["first", "last", " "]) == "its process ended with exit code 1: last"
    assert describe_exit(2, []) == "its process ended with exit code 2"
    assert describe_exit(-9, ["last"]).endswith("; use a smaller batch_size or max_length")
    assert "SIGSEGV" in describe_exit(-11, ["last"])
