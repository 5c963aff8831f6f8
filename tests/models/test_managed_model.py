"""Loads, deaths, restarts, leases and unloads of a model. The workers are scripted processes."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from tests.models.workers import ask, drive, script, scripted, text_of, until, worker_of
from tinyoai import errors, wire
from tinyoai.models import managed_model
from tinyoai.models.managed_model import COOL_S, FOREVER, LAST_DELAY_S, Restarts
from tinyoai.models.model_status import State
from tinyoai.models.pool import Pool
from tinyoai.models.registry import Model
from tinyoai.models.spawn import spawn_worker
from tinyoai.sampling import Sampling

LOAD = wire.Load(path="", name="m", engine="", n_slots=2, n_ctx=512)
HOLD = script(hold=True)
RELEASE = script(release=True)


@pytest.fixture(autouse=True)
def stand_in() -> Iterator[None]:
    """Makes the workers run the scripted worker."""
    with scripted():
        yield


def load_with(**fields: Any) -> wire.Load:
    """Returns a Load with a script."""
    return wire.Load(path="", name="m", engine="", template=script(**fields))


# -- restart decisions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ("d", (State.WAITING, 0.0)),
        ("dd", (State.WAITING, 0.1)),
        ("ddd", (State.WAITING, 0.2)),
        ("dddd", (State.WAITING, 0.4)),
        ("d" * 8, (State.WAITING, 6.4)),
        ("d" * 9, (State.WAITING, LAST_DELAY_S)),
        ("d" * 2000, (State.WAITING, LAST_DELAY_S)),
        ("dddDd", (State.WAITING, 0.0)),
        ("u", (State.WAITING, 0.0)),
        ("uu", (State.WAITING, 0.1)),
        ("uuu", (State.FAILED, COOL_S)),
        ("uudu", (State.WAITING, 0.4)),
        ("duu", (State.WAITING, 0.2)),
        ("uuduuu", (State.FAILED, COOL_S)),
        ("uuDu", (State.FAILED, COOL_S)),
    ],
)
def test_the_state_after_a_death(history: str, expected: tuple[State, float]) -> None:
    """In a history, d is a death after Ready, u a death before Ready, and D a finished request."""
    restarts = Restarts()
    found = None
    for event in history:
        if event == "D":
            restarts.on_done()
        else:
            found = restarts.on_death(ready=event == "d")
    assert found == (expected[0], pytest.approx(expected[1]))


# -- deaths and restarts -----------------------------------------------------------------------------


def test_a_killed_process_is_restarted_without_a_request() -> None:
    async def body(pool: Pool) -> None:
        worker, model = await worker_of(pool), pool.default
        os.kill(worker.pid, signal.SIGKILL)
        while model.worker is worker or model.state is not State.READY:
            await model.changed.wait()
        assert model.status().n_deaths == 1
        assert await ask(pool, "hello") == "hello"

    drive(body, LOAD)


def test_requests_that_kill_their_workers_do_not_disable_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(managed_model, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(managed_model, "LAST_DELAY_S", 0.002)

    async def body(pool: Pool) -> None:
        async def bad() -> None:
            for _ in range(5):
                with pytest.raises(errors.WorkerDied):
                    await ask(pool, script(die="started"))
                assert pool.default.state is not State.FAILED

        await bad()
        # two such requests at once, beside a normal one
        await asyncio.gather(bad(), bad())
        assert await ask(pool, "innocent") == "innocent"
        assert pool.default.n_deaths == 15

    drive(body, LOAD)


def test_three_deaths_before_ready_fail_the_model_until_it_has_cooled_down(tmp_path: Path) -> None:
    count = tmp_path / "count"

    async def body(pool: Pool) -> None:
        model = pool.default
        with pytest.raises(errors.ModelFailed, match="SIGKILL"):
            await ask(pool, "hello")
        assert model.state is State.FAILED
        assert model.n_deaths == 3
        with pytest.raises(errors.ModelFailed):
            await ask(pool, "not tried")
        assert len(count.read_text()) == 3
        model._retry_at = 0.0  # simulates the end of the cool-down
        assert await ask(pool, "hello") == "hello"
        assert model.n_deaths == 5

    drive(body, load_with(deaths=5, count=str(count)))


def test_two_deaths_before_ready_are_no_failure(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        assert await ask(pool, "hello") == "hello"
        assert pool.default.n_deaths == 2

    drive(body, load_with(deaths=2, count=str(tmp_path / "count")))


def test_a_refused_model_fails_at_once() -> None:
    async def body(pool: Pool) -> None:
        with pytest.raises(errors.ModelFailed) as caught:
            await pool.first_load()
        assert caught.value.message == "the file is too new"
        with pytest.raises(errors.ModelFailed, match="the model 'm' failed: the file is too new"):
            await ask(pool, "hello")
        assert pool.default.n_deaths == 0
        assert pool.default.status().reason == "the file is too new"
        assert not pool.default.reserved

    drive(body, load_with(refuse="the file is too new"))


def test_a_process_that_cannot_be_started_fails_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("no more processes")

    monkeypatch.setattr("tinyoai.models.worker.spawn_worker", broken)

    async def body(pool: Pool) -> None:
        with pytest.raises(errors.ModelFailed, match="no more processes"):
            await ask(pool, "hello")

    drive(body, LOAD)


def test_the_first_load_takes_over_the_process_that_was_started_ahead() -> None:
    spawned = spawn_worker()

    async def body(pool: Pool) -> None:
        worker = await worker_of(pool)
        assert worker.pid == spawned.process.pid
        os.kill(worker.pid, signal.SIGKILL)
        assert await ask(pool, "hello") == "hello"

    drive(body, LOAD, spawned=spawned)


def test_an_unused_process_that_was_started_ahead_is_ended() -> None:
    spawned = spawn_worker()

    async def body(pool: Pool) -> None:
        pass

    drive(body, LOAD, spawned=spawned)
    assert not Path(f"/proc/{spawned.process.pid}").exists()


# -- leases and unloads ------------------------------------------------------------------------------


async def begin(lease: Any, text: str = HOLD) -> asyncio.Future[str]:
    """Starts a request that is held in the worker and has a slot."""
    begun = asyncio.Event()

    async def read() -> str:
        parts = []
        async for _, event in lease.run([wire.Generate(prompt=[wire.Text(text)], sampling=Sampling())]):
            if isinstance(event, wire.Content):
                parts.append(event.text)
            elif isinstance(event, wire.Accepted):
                begun.set()
        return "".join(parts)

    reading = asyncio.ensure_future(read())
    await begun.wait()
    return reading


def test_an_unload_lets_answers_finish_and_delays_new_leases() -> None:
    async def body(pool: Pool) -> None:
        model = pool.default
        async with pool.lease("m") as lease:
            first = await begin(lease)
            old = model.worker
            assert old is not None
            assert (await pool.unload("m"))[1]
            assert model.unload_pending
            async with pool.lease("m") as late:
                assert late.loading
                assert not lease.loading
                waiting = asyncio.ensure_future(text_of(late, "late"))
                await asyncio.sleep(0)
                assert old.n_open == 1  # the late request was not sent
                assert await text_of(lease, RELEASE) == "x"  # a request with a lease continues
                assert await first == ""
                assert not waiting.done()
                assert (await pool.unload("m"))[1]  # a second unload changes nothing
                assert model.unload_pending
        # `late` was closed while its request was running
        with pytest.raises((errors.ApiError, asyncio.CancelledError)):
            waiting.cancel()
            await waiting

    drive(body, LOAD)


def test_a_model_unloads_under_steady_traffic_and_loads_again() -> None:
    async def body(pool: Pool) -> None:
        model = pool.default
        stop = False
        n_answers = 0

        async def client() -> None:
            nonlocal n_answers
            while not stop:
                assert await ask(pool, "hello") == "hello"
                n_answers += 1

        clients = [asyncio.ensure_future(client()) for _ in range(4)]
        for _ in range(3):
            while model.state is not State.READY or not n_answers:
                await asyncio.sleep(0.001)
            old = model.worker
            assert (await pool.unload("m"))[1]
            while model.worker is old or model.state is not State.READY:
                await model.changed.wait()
            assert not model.unload_pending
            n_answers = 0
        stop = True
        await asyncio.gather(*clients)
        assert model.n_deaths == 0
        assert model.n_leases == 0

    drive(body, LOAD)


def test_leases_that_wait_for_an_unload_load_the_model_again() -> None:
    async def body(pool: Pool) -> None:
        model = pool.default
        async with pool.lease("m") as lease:
            await lease.ready()
            old = model.worker
            await pool.unload("m")
            waiting = [asyncio.ensure_future(ask(pool, f"{i}")) for i in range(3)]
            preload = asyncio.ensure_future(pool.preload("m"))
            given_up = asyncio.ensure_future(ask(pool, "given up"))
            await asyncio.sleep(0)
            given_up.cancel()
            await asyncio.wait({given_up})
            assert model.state is State.READY
        assert await asyncio.gather(*waiting) == ["0", "1", "2"]
        assert not (await preload)[1]
        assert model.worker is not old
        assert model.n_leases == 0
        assert (await pool.unload("m"))[1]
        assert model.state is State.UNLOADED  # unloads at once, so no count of leases is too high

    drive(body, LOAD)


def test_a_worker_that_dies_while_an_unload_is_pending_is_restarted_for_its_leases() -> None:
    async def body(pool: Pool) -> None:
        async with pool.lease("m") as lease:
            await lease.ready()
            await pool.unload("m")
            with pytest.raises(errors.WorkerDied):
                await text_of(lease, script(die="started"))
            assert await text_of(lease, "again") == "again"
            assert pool.default.unload_pending
        await until(pool.default, State.UNLOADED)
        await pool.unload("m")
        assert not pool.default.loaded
        assert not pool.default.unload_pending

    drive(body, LOAD)


def test_a_load_cancelled_before_its_first_step_leaves_the_model_usable() -> None:
    async def body(pool: Pool) -> None:
        model = pool.default
        async with pool.lease("m") as lease:
            waiting = asyncio.ensure_future(lease.ready())
            while not model.loaded:
                await asyncio.sleep(0)
            model._begin_unload()
            assert model.state is State.UNLOADED
            await waiting
        assert await ask(pool, "hello") == "hello"

    drive(body, LOAD)


def test_keep_alive_runs_from_the_last_lease() -> None:
    async def body(pool: Pool) -> None:
        model = pool.default
        async with pool.lease("m", 600) as lease:
            await lease.ready()
            assert model.status().unloads_in_s is None
        unloads_in = model.status().unloads_in_s
        assert unloads_in is not None
        assert 500 < unloads_in <= 600
        async with pool.lease("m", 0.01):
            assert model.status().unloads_in_s is None
        await until(model, State.UNLOADED)
        assert model.keep_alive_s == FOREVER  # the keep-alive of a request ends with the load
        assert await ask(pool, "hello", keep_alive=0) == "hello"
        await until(model, State.UNLOADED)

    drive(body, LOAD)


def test_status_of_an_unloaded_a_busy_and_an_idle_model() -> None:
    async def body(pool: Pool) -> None:
        model = pool.default
        status = model.status()
        assert (status.name, status.state, status.pid, status.ready) == ("m", State.UNLOADED, None, None)
        assert (status.last_used, status.tokens_per_second, status.n_answers) == (None, None, 0)
        async with pool.lease("m") as lease:
            held = await begin(lease)
            status = model.status()
            assert model.worker is not None
            assert status.pid == model.worker.pid
            assert status.ready is model.worker.ready
            assert (status.n_leases, status.n_running, status.n_queued) == (1, 1, 0)
            assert status.estimated_bytes == model.estimate.total > 0
            assert status.reserved
            assert status.uptime_s > 0
            await text_of(lease, RELEASE)
            await held
        status = model.status()
        assert (status.n_leases, status.n_running, status.n_answers, status.n_deaths) == (0, 0, 2, 0)
        assert status.tokens_per_second == pytest.approx(1000)
        assert status.last_used is not None

    drive(body, LOAD)


def test_each_answer_is_reported_with_its_choices() -> None:
    async def body(pool: Pool) -> None:
        seen: list[tuple[str, int]] = []
        pool.on_done = lambda name, done, choices: seen.append((name, len(choices)))
        await ask(pool, "hello")
        with pytest.raises(errors.WorkerDied):
            await ask(pool, script(die="content"))
        assert seen == [("m", 1)]

    drive(body, LOAD)


def test_what_a_load_took_counts_in_the_next_plan_of_the_same_load() -> None:
    load = wire.Load(path="/m", name="m", engine="ctransformers", n_ctx=512)
    model = Model(name="m", path="/m", size=10**6)
    usual = managed_model.estimate(model, load)
    info = wire.ModelInfo(
        name="m", architecture="", quantization="", engine="", n_params=0, n_vocab=0, n_ctx=0, n_ctx_train=0,
        n_embd=0, file_size=0, bos_id=0, eos_id=0, eog_ids=(), special={}, chat_template="", add_bos=False,
        add_space_prefix=False, n_embd_out=7, pooling="mean",
    )  # fmt: skip
    for more, total in ((-(2**20), usual.total), (50 * 2**20, usual.total + 50 * 2**20)):
        ready = wire.Ready(info=info, n_slots=1, n_threads=1, version="", resident_bytes=usual.total + more)
        loaded = structs.replace(model, loaded=managed_model.last_load(load, ready))
        assert loaded.loaded is not None
        assert (loaded.loaded.n_embd_out, loaded.loaded.pooling) == (7, "mean")
        assert total <= managed_model.estimate(loaded, load).total < total + 2**20
        for change in ({"n_ctx": 256}, {"cache_type_k": "q8_0"}, {"mmap": False}):
            other = structs.replace(load, **change)
            assert managed_model.estimate(loaded, other) == managed_model.estimate(model, other)
