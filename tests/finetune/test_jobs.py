"""The life of jobs, with a scripted program in the place of the one that trains."""

import asyncio
import errno
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tinyoai import errors
from tinyoai.finetune import jobs
from tinyoai.finetune.dataset import Example
from tinyoai.finetune.jobs import Job, Jobs
from tinyoai.finetune.train_config import Order, Spec
from tinyoai.host import atomic, subproc

TRAINER = """
import json, os, pathlib, sys, threading, time
folder = pathlib.Path(sys.argv[-1])
(folder / "began").open("a").write("x")
plan = json.loads((folder.parent.parent / "plan.json").read_text())
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
def say(**fields):
    print(json.dumps(fields), flush=True)
n = plan.get("n_steps", 3)
say(type="Running", n_examples=1, n_samples=1, n_cut=0, n_trained=1, n_steps=n, from_step=plan.get("from_step", 0))
for step in range(plan.get("from_step", 0) + 1, n + 1):
    say(type="Step", step=step, epoch=1.0, loss=1.0, learning_rate=0.1, n_tokens=1, seconds=1.0)
print(plan.get("says", ""), file=sys.stderr, flush=True)
while plan.get("waits") and not (folder / "go").exists():
    time.sleep(0.01)
out = pathlib.Path(json.loads((folder / "order.json").read_text())["out"])
if plan.get("part"):
    out.with_name(f".{out.name}.part").write_text("half")
    os._exit(1)
out.write_text("model")
say(type="Made", size=5)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory whose jobs are run by the script."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    monkeypatch.setattr(subproc, "PYTHON", (sys.executable, str(script)))
    monkeypatch.setattr(jobs, "LOOK_S", 0.02, raising=False)
    plan(tmp_path)
    return tmp_path


def plan(home: Path, **fields: object) -> None:
    """What the script does."""
    (home / "plan.json").write_text(json.dumps(fields))


async def made(job: Job, path: Path) -> int:
    """Registers nothing."""
    return 7


async def start(server: Jobs, name: str = "new") -> Job:
    """A new job."""
    order = Order(path="", template="chatml", chat=True, out=str(server.place(name)), spec=Spec())
    return await server.start(order, [Example(text="a")], model="m", model_id=1, name=name, dataset="d")


async def until(true: Callable[[], bool]) -> None:
    """Waits for what is to come."""
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.01)


def run(home: Path, test: Callable[[Jobs], Awaitable[None]]) -> None:
    """Runs a test with an open server's jobs."""

    async def all_of_it() -> None:
        server = Jobs(str(home), made)
        await server.open()
        try:
            await test(server)
        finally:
            await server.close()

    asyncio.run(all_of_it())


def began(home: Path, id_: int = 1) -> int:
    """How often a job's process was started."""
    path = home / "finetune" / str(id_) / "began"
    return len(path.read_text()) if path.exists() else 0


def test_two_servers_on_a_data_directory_run_a_job_once(home: Path) -> None:
    plan(home, waits=True)

    async def test(first: Jobs) -> None:
        job = await start(first)
        await until(lambda: job.status == "running")
        second = Jobs(str(home), made)
        await second.open()
        other = second.find(1)
        assert other is not None
        own = await start(second, "own")
        await until(lambda: own.status == "running")  # the other's job is not in its way
        with pytest.raises(errors.BadRequest, match="another server"):
            await second.stop(other)
        (home / "finetune" / "1" / "go").touch()
        (home / "finetune" / "2" / "go").touch()
        await until(lambda: job.status == own.status == "completed")
        await until(lambda: other.status == "completed")
        assert (began(home), other.result_id) == (1, 7)
        await second.close()

    run(home, test)


def test_a_server_that_stays_takes_over_from_one_that_ends(home: Path) -> None:
    plan(home, waits=True)

    async def test(first: Jobs) -> None:
        job = await start(first)
        await until(lambda: job.status == "running")
        second = Jobs(str(home), made)
        await second.open()
        await first.close()
        await until(lambda: began(home) == 2)
        (home / "finetune" / "1" / "go").touch()
        other = second.find(1)
        assert other is not None
        await until(lambda: other.status == "completed")
        await second.close()

    run(home, test)


def test_a_stopped_job_does_not_go_on_with_the_next_server(home: Path) -> None:
    plan(home, waits=True)

    async def test(first: Jobs) -> None:
        job = await start(first)
        await until(lambda: job.status == "running")
        await first.stop(job)
        await first.close()

    run(home, test)
    kept = json.loads((home / "finetune" / "1" / "job.json").read_text())
    assert kept["status"] == "stopped"
    assert kept["ended"]


def test_who_leaves_while_a_job_is_written_down_leaves_a_job(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(server: Jobs) -> None:
        asked = asyncio.ensure_future(start(server))
        await asyncio.sleep(0)
        asked.cancel()
        await until(lambda: bool(server.all()) and server.all()[0].status == "completed")

    run(home, test)


def test_a_name_is_taken_as_soon_as_it_is_asked_for(home: Path) -> None:
    async def test(server: Jobs) -> None:
        asked = asyncio.ensure_future(start(server, "mine"))
        await asyncio.sleep(0)
        assert "mine" in server.names()
        await asked

    run(home, test)


def test_no_more_wait_than_may_however_many_ask_at_once(home: Path) -> None:
    plan(home, waits=True)

    async def test(server: Jobs) -> None:
        asked = [start(server, str(i)) for i in range(2 * jobs.MAX_WAITING + 4)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(one, errors.Overloaded) for one in found) >= jobs.MAX_WAITING
        assert sum(isinstance(one, Job) for one in found) >= jobs.MAX_WAITING

    run(home, test)


def test_what_could_not_be_written_down_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = atomic.replace

    def full(path: Path, data: bytes) -> None:
        if path.name == "job.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        replace(path, data)

    async def test(server: Jobs) -> None:
        monkeypatch.setattr(atomic, "replace", full)
        with pytest.raises(errors.Unavailable, match="No space left"):
            await start(server)
        assert list((home / "finetune").iterdir()) == []
        assert server.names() == set()

    run(home, test)


def test_a_folder_that_cannot_be_written_is_a_sentence_without_a_path(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan(home, waits=True)

    async def test(server: Jobs) -> None:
        first, second = await start(server, "a"), await start(server, "b")
        (home / "finetune" / "2" / "log.txt").mkdir()
        await server.stop(first)
        await until(lambda: second.status == "failed")
        assert second.error == "it could not be run: Is a directory"

    run(home, test)
    assert "Traceback" not in caplog.text


def test_half_a_model_is_taken_away(home: Path) -> None:
    plan(home, part=True, says='File "/home/me/secret/lib.py", line 3: it\'s /a/b/c')

    async def test(server: Jobs) -> None:
        job = await start(server)
        await until(lambda: job.ended is not None)
        await until(lambda: not list((home / "models").iterdir()))
        assert server.lines(job) == ['File "lib.py", line 3: it\'s c']
        assert job.error == 'its process ended with exit code 1: File "lib.py", line 3: it\'s c'

    run(home, test)


def test_a_long_learning_curve_is_thinned_where_it_is_kept(home: Path) -> None:
    plan(home, n_steps=5003)

    async def test(server: Jobs) -> None:
        job = await start(server)
        await until(lambda: job.ended is not None)
        curve = server.metrics(job)
        assert [curve[0].step, curve[1].step, curve[-1].step] == [1, 7, 5003]
        assert len((home / "finetune" / "1" / "metrics.jsonl").read_bytes().splitlines()) <= jobs.MAX_POINTS
        assert len(curve) <= jobs.MAX_POINTS + 1

    run(home, test)


def test_what_is_done_again_is_told_once(home: Path) -> None:
    plan(home, n_steps=3000, waits=True)

    async def test(server: Jobs) -> None:
        job = await start(server)
        await until(lambda: job.last is not None and job.last.step == 3000)

    run(home, test)
    plan(home, n_steps=3000, from_step=1500)

    async def again(server: Jobs) -> None:
        job = server.find(1)
        assert job is not None
        await until(lambda: job.ended is not None)
        steps = [step.step for step in server.metrics(job)]
        assert steps == [*range(1, 3000, 3), 3000]

    run(home, again)
