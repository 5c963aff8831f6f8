"""The queue of jobs. A scripted program replaces the one that trains."""

import asyncio
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tinyoai import errors
from tinyoai.finetune import dataset, job_store, jobs, protocol
from tinyoai.finetune.dataset import Example
from tinyoai.finetune.job_store import TrainingJob
from tinyoai.finetune.jobs import Jobs
from tinyoai.finetune.protocol import JobSpec
from tinyoai.finetune.train_config import TrainConfig
from tinyoai.host import atomic, subproc

OLD = Path(__file__).parent.parent / "fixtures" / "datadir-0.1" / "finetune"
"""Jobs written by version 0.1: one completed, one running when its server was killed, one waiting, one stopped."""

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
os._exit(0)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory whose jobs run the script."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    monkeypatch.setattr(subproc, "PYTHON", (sys.executable, str(script)))
    plan(tmp_path)
    return tmp_path


def plan(home: Path, **fields: object) -> None:
    """Writes the plan that the script follows."""
    (home / "plan.json").write_text(json.dumps(fields))


async def finished(job: TrainingJob, path: Path) -> int:
    """Registers nothing and returns a model id."""
    return 7


async def start(server: Jobs, name: str = "new") -> TrainingJob:
    """Starts a new job."""
    out = str(server.model_path(name))
    spec = JobSpec(path="", template="chatml", chat=True, out=out, config=TrainConfig())
    return await server.start(spec, [Example(text="a")], model="m", model_id=1, name=name, dataset="d")


async def until(true: Callable[[], bool]) -> None:
    """Waits until the condition is true."""
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.01)


def run(home: Path, test: Callable[[Jobs], Awaitable[None]], *, acquire: bool = True) -> None:
    """Runs a test with the jobs of an open server, which acquires the queue unless `acquire` is false."""

    async def all_of_it() -> None:
        server = Jobs(str(home), finished)
        await server.open()
        if acquire:
            await server.acquire()
        try:
            await test(server)
        finally:
            await server.close()

    asyncio.run(all_of_it())


def began(home: Path, id_: int = 1) -> int:
    """Returns how often a job's process was started."""
    path = home / "finetune" / str(id_) / "began"
    return len(path.read_text()) if path.exists() else 0


def held_by(pid: int) -> str:
    """Returns the error of a server that does not hold the queue."""
    return f"fine-tuning in this data directory is run by the tinyoai server with pid {pid}; ask that server"


def test_a_second_server_lists_the_jobs_and_says_who_runs_them(home: Path) -> None:
    plan(home, waits=True)

    async def test(first: Jobs) -> None:
        job = await start(first)
        await until(lambda: job.last_step is not None and job.last_step.step == 3)
        second = Jobs(str(home), finished)
        await second.open()
        (other,) = second.all()
        assert (other.status, other.training, other.last_step) == (
            "running",
            job.training,
            first.store.curve(job)[-1],
        )
        with pytest.raises(errors.BadRequest) as caught:
            await start(second, "own")
        assert str(caught.value) == held_by(os.getpid())
        with pytest.raises(errors.BadRequest) as caught:
            await second.stop(1)
        assert str(caught.value) == held_by(os.getpid())
        assert job.status == "running"
        (home / "finetune" / "1" / "go").touch()
        await until(lambda: job.status == "completed")
        await until(lambda: first.store.read_all()[0].status == "completed")  # saved a moment later
        await second.refresh()
        (other,) = second.all()
        assert (other.status, other.result_id) == ("completed", 7)
        assert await second.stop(1) == other, "every server can answer for an ended job"
        assert (began(home), sorted(path.name for path in first.store.root.iterdir())) == (1, ["1", "lock"])
        await second.close()

    run(home, test)


def test_the_holder_is_another_process(home: Path) -> None:
    program = (
        "import fcntl, os, sys\n"
        "lock = open(sys.argv[1], 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print(os.getpid(), file=lock, flush=True)\n"
        "print(flush=True)\n"
        "sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, str(home / "finetune" / "lock")]

    async def test(server: Jobs) -> None:
        (home / "finetune").mkdir()
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            with pytest.raises(errors.BadRequest) as caught:
                await start(server)
            assert str(caught.value) == held_by(holder.pid)
            holder.kill()
        job = await start(server)
        await until(lambda: job.status == "completed")

    run(home, test, acquire=False)


def test_the_next_server_takes_the_queue_of_one_that_ended(home: Path) -> None:
    plan(home, waits=True)

    async def test(first: Jobs) -> None:
        job = await start(first)
        await until(lambda: job.status == "running")
        second = Jobs(str(home), finished)
        await second.open()
        assert began(home) == 1
        await first.close()
        await second.refresh()
        await until(lambda: began(home) == 2)
        (home / "finetune" / "1" / "go").touch()
        await until(lambda: second.all()[0].status == "completed")
        await second.close()

    run(home, test)


def test_a_server_that_never_trains_leaves_no_folder(home: Path) -> None:
    async def test(server: Jobs) -> None:
        await server.refresh()
        assert server.all() == []
        assert await server.stop(1) is None
        assert not (home / "finetune").exists()

    run(home, test, acquire=False)


def test_jobs_of_version_0_1_are_read_and_resumed(home: Path) -> None:
    shutil.copytree(OLD, home / "finetune")
    (home / "models").mkdir()
    for path in (home / "finetune").glob("*/order.json"):
        path.write_text(path.read_text().replace("/srv/tinyoai", str(home)))
    plan(home, n_steps=2000, from_step=28)

    async def test(server: Jobs) -> None:
        done, long_, waits, stopped = sorted(server.all(), key=lambda job: job.id)
        assert (done.status, done.result_id, done.config.lora_r) == ("completed", 2, 2)
        assert done.training is not None
        assert done.last_step is not None
        assert (done.training.n_trained, done.last_step.loss) == (39424, 7.162739)
        assert [step.step for step in server.store.curve(done)] == list(range(1, 9))
        assert server.store.log_lines(1) == ["reading 2 examples", "writing the new model"]
        assert (long_.config.epochs, waits.config.use_lora) == (1000, False)
        assert stopped.status == "stopped"
        for id_ in (1, 3, 4, 5):
            spec = protocol.read_spec(home / "finetune" / str(id_))
            assert (spec.config, spec.template, spec.chat) == (server.find(id_).config, "auto", True)  # type: ignore[union-attr]
            assert len(dataset.parse((home / "finetune" / str(id_) / "data.jsonl").read_bytes())) == 2
        await until(lambda: waits.status == long_.status == "completed")
        assert [began(home, id_) for id_ in (1, 3, 4, 5)] == [0, 1, 1, 0]
        assert [step.step for step in server.store.curve(long_)] == [
            *range(1, 29, 2),
            *range(29, 2001, 2),
            2000,
        ]

    run(home, test)


def test_the_next_server_does_not_resume_a_stopped_job(home: Path) -> None:
    plan(home, waits=True)

    async def test(first: Jobs) -> None:
        job = await start(first)
        await until(lambda: job.status == "running")
        await first.stop(job.id)
        await first.close()

    run(home, test)
    kept = json.loads((home / "finetune" / "1" / "job.json").read_text())
    assert kept["status"] == "stopped"
    assert kept["ended"]


def test_a_job_runs_although_its_client_disconnects_while_it_is_saved(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(server: Jobs) -> None:
        asked = asyncio.ensure_future(start(server))
        await asyncio.sleep(0)
        asked.cancel()
        await until(lambda: bool(server.all()) and server.all()[0].status == "completed")

    run(home, test)


def test_a_name_is_reserved_at_the_request(home: Path) -> None:
    async def test(server: Jobs) -> None:
        asked = asyncio.ensure_future(start(server, "mine"))
        await asyncio.sleep(0)
        assert "mine" in server.names()
        await asked

    run(home, test)


def test_the_number_of_waiting_jobs_is_limited_for_concurrent_requests(home: Path) -> None:
    plan(home, waits=True)

    async def test(server: Jobs) -> None:
        asked = [start(server, str(i)) for i in range(2 * jobs.MAX_WAITING + 4)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(one, errors.Overloaded) for one in found) >= jobs.MAX_WAITING
        assert sum(isinstance(one, TrainingJob) for one in found) >= jobs.MAX_WAITING

    run(home, test)


def test_a_job_that_cannot_be_saved_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = atomic.replace

    def full(path: Path, data: bytes) -> None:
        if path.name == "job.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        replace(path, data)

    async def test(server: Jobs) -> None:
        monkeypatch.setattr(atomic, "replace", full)
        with pytest.raises(errors.Unavailable, match="No space left"):
            await start(server)
        assert [path.name for path in (home / "finetune").iterdir()] == ["lock"]
        assert server.names() == set()

    run(home, test)


def test_the_error_for_an_unwritable_folder_has_no_path(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan(home, waits=True)

    async def test(server: Jobs) -> None:
        first, second = await start(server, "a"), await start(server, "b")
        (home / "finetune" / "2" / "log.txt").mkdir()
        await server.stop(first.id)
        await until(lambda: second.status == "failed")
        assert second.error == "it could not be run: Is a directory"

    run(home, test)
    assert "Traceback" not in caplog.text


def test_an_incomplete_model_is_deleted(home: Path) -> None:
    plan(home, part=True, says='File "/home/me/secret/lib.py", line 3: it\'s /a/b/c')

    async def test(server: Jobs) -> None:
        job = await start(server)
        await until(lambda: job.ended is not None)
        await until(lambda: not list((home / "models").iterdir()))
        assert server.store.log_lines(job.id) == ['File "lib.py", line 3: it\'s c']
        assert job.error == 'its process ended with exit code 1: File "lib.py", line 3: it\'s c'

    run(home, test)


def test_a_long_learning_curve_is_stored_thinned(home: Path) -> None:
    plan(home, n_steps=5003)

    async def test(server: Jobs) -> None:
        job = await start(server)
        await until(lambda: job.ended is not None)
        curve = server.store.curve(job)
        assert [curve[0].step, curve[1].step, curve[-1].step] == [1, 7, 5003]
        assert (
            len((home / "finetune" / "1" / "metrics.jsonl").read_bytes().splitlines()) <= job_store.MAX_POINTS
        )
        assert len(curve) <= job_store.MAX_POINTS + 1

    run(home, test)


def test_repeated_steps_are_in_the_curve_once(home: Path) -> None:
    plan(home, n_steps=3000, waits=True)

    async def test(server: Jobs) -> None:
        job = await start(server)
        await until(lambda: job.last_step is not None and job.last_step.step == 3000)

    run(home, test)
    plan(home, n_steps=3000, from_step=1500)

    async def again(server: Jobs) -> None:
        job = server.find(1)
        assert job is not None
        await until(lambda: job.ended is not None)
        steps = [step.step for step in server.store.curve(job)]
        assert steps == [*range(1, 3000, 3), 3000]

    run(home, again)
