"""Several models at once: loaded on use, kept within a memory budget, unloaded in order, never under a use.

The workers are real processes with the scripted engine; the files are real too, for their sizes.
"""

import asyncio
import os
import random
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.engines import make
from tinyoai import errors, wire
from tinyoai.models import memory_estimate as estimate
from tinyoai.models.catalog import Catalog
from tinyoai.models.pool import DEATHS, FOREVER, Entry, Pool, State
from tinyoai.models.registry import Model

DEFAULT = Model(name="default", path="")
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of one size."""
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        make.llama(folder / f"{name}.gguf", n_embd=64, n_ctx=512)
    return folder


def load(model: Model, n_ctx: int = 512) -> wire.Load:
    """What a worker with the scripted engine is told."""
    return wire.Load(path=model.path, name=model.name, engine="fake", n_ctx=n_ctx, n_slots=2)


def need(folder: Path) -> int:
    """What each of the three models takes, in bytes."""
    model = Catalog(DEFAULT, folder=str(folder), register=False)
    model.refresh()
    found = model.lookup("a")
    return estimate.need(found, load(found)).total


Body = Callable[[Pool], Coroutine[Any, Any, None]]


def drive(body: Body, folder: Path, *, room: float = 0, keep_alive: float = FOREVER, **more: Any) -> None:
    """Runs a test's body with a pool whose budget is `room` of the three models; no worker is left after it."""

    async def run() -> None:
        catalog = Catalog(DEFAULT, folder=str(folder), register=False)
        pool = Pool(
            catalog,
            more.get("make_load", load),
            budget=int(room * need(folder)),
            keep_alive=keep_alive,
            timeout=30,
        )
        await pool.look()
        try:
            await body(pool)
        finally:
            pids = [entry.worker.pid for entry in pool.entries if entry.worker is not None]
            await pool.stop()
            for pid in pids:
                assert not Path(f"/proc/{pid}").exists()

    asyncio.run(asyncio.wait_for(run(), 60))


async def said(pool: Pool, name: str, text: str = "hello", keep_alive: float | None = None) -> str:
    """One request."""
    async with pool.lease(name, keep_alive) as lease:
        return await answer(lease, text)


async def answer(lease: Any, text: str) -> str:
    """One answer's text."""
    parts = []
    async for event in lease.call(
        lambda call_id: wire.Generate(
            id=call_id,
            prompt=[wire.Special("bos"), wire.Text(text + "\n")],
            sampling=wire.Sampling(temperature=0),
        )
    ):
        assert not isinstance(event, wire.Failed), event
        if isinstance(event, wire.Delta):
            parts.append(event.text)
    return "".join(parts)


def loaded(pool: Pool) -> list[str]:
    """The names of what is loaded."""
    return [entry.model.name for entry in pool.entries if entry.state is State.READY]


async def until(entry: Entry, state: State) -> None:
    """When the entry is in this state."""
    while entry.state is not state:
        await entry.changed.wait()


def test_models_are_loaded_on_first_use_and_run_side_by_side(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        assert loaded(pool) == []
        assert await asyncio.gather(*(said(pool, name, name) for name in NAMES)) == list(NAMES)
        assert sorted(loaded(pool)) == list(NAMES)
        assert len({pool.find(name).worker.pid for name in NAMES}) == 3  # type: ignore[union-attr]

    drive(body, folder)


def test_many_first_uses_start_one_process(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        started: list[str] = []
        real = pool._make_load
        pool._make_load = lambda model: (started.append(model.name), real(model))[1]
        assert await asyncio.gather(*(said(pool, "a", str(i)) for i in range(8))) == [
            str(i) for i in range(8)
        ]
        assert started.count("a") == 2  # for the entry, and for its one load

    drive(body, folder)


def test_the_least_recently_used_one_makes_room(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        for name in ("a", "b", "a", "c"):
            assert await said(pool, name, keep_alive=600) == "hello"
        assert sorted(loaded(pool)) == ["a", "c"]
        assert pool.find("b").timer is None  # nothing is left to wait for
        assert await said(pool, "b") == "hello"
        assert sorted(loaded(pool)) == ["b", "c"]

    drive(body, folder, room=2.5)


def test_one_in_use_is_waited_for_and_never_unloaded(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        async with pool.lease("a") as lease:
            pid = pool.find("a").worker.pid  # type: ignore[union-attr]
            waiting = asyncio.ensure_future(said(pool, "b"))
            await until(pool.find("b"), State.LOADING)
            while "waits" not in pool.find("b").why:
                await pool.find("b").changed.wait()
            assert await answer(lease, "still here") == "still here"
            assert pool.find("a").worker.pid == pid  # type: ignore[union-attr]
            assert not waiting.done()
        assert await waiting == "hello"
        assert loaded(pool) == ["b"]

    drive(body, folder, room=1.5)


def test_a_request_that_gives_up_waiting_leaves_nothing_behind(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        async with pool.lease("a"):
            waiting = asyncio.ensure_future(said(pool, "b"))
            while "waits" not in pool.find("b").why:
                await pool.find("b").changed.wait()
            waiting.cancel()
            await asyncio.wait({waiting})
        await until(pool.find("b"), State.UNLOADED)
        assert pool.find("b").uses == 0
        assert loaded(pool) == ["a"]
        assert await said(pool, "b") == "hello"

    drive(body, folder, room=1.5)


def test_what_cannot_fit_is_refused_with_the_context_that_would(folder: Path) -> None:
    n_ctx = 4096

    def wide(model: Model) -> wire.Load:
        return load(model, n_ctx)

    async def body(pool: Pool) -> None:
        nonlocal n_ctx
        with pytest.raises(errors.InsufficientMemory) as caught:
            await said(pool, "b")
        assert caught.value.status == 503
        assert caught.value.code == "insufficient_memory"
        assert caught.value.headers["x-should-retry"] == "false"
        assert pool.find("b").state is State.UNLOADED
        assert loaded(pool) == []  # nothing was unloaded or started for it
        fits = int(caught.value.message.partition("a context of ")[2].split()[0])
        assert fits % estimate.BLOCK == 0
        n_ctx = fits + estimate.BLOCK
        with pytest.raises(errors.InsufficientMemory):
            await said(pool, "b")
        n_ctx = fits
        assert await said(pool, "b") == "hello"

    drive(body, folder, room=1.0, make_load=wide)


def test_where_no_context_would_fit_another_model_is_advised(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        with pytest.raises(errors.InsufficientMemory, match="smaller or more quantized"):
            await said(pool, "a")

    drive(body, folder, room=0.1)


def test_keep_alive_unloads_after_the_last_use(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        entry = pool.find("a")
        assert await said(pool, "a", keep_alive=0) == "hello"
        await until(entry, State.UNLOADED)
        assert await said(pool, "a") == "hello"  # that was said of the other load
        assert entry.keep_s == FOREVER
        async with pool.lease("a", 0.05):
            async with pool.lease("a"):
                pass
            assert entry.timer is None  # it is in use still
            assert entry.state is State.READY
        assert entry.timer is not None
        async with pool.lease("a"):
            assert entry.timer is None  # a use stops the clock
        await until(entry, State.UNLOADED)
        await said(pool, "a", keep_alive=FOREVER)
        assert entry.timer is None

    drive(body, folder)


def test_the_pool_s_own_keep_alive_holds_where_none_is_given(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        await said(pool, "a")
        await until(pool.find("a"), State.UNLOADED)
        await said(pool, "b", keep_alive=FOREVER)
        await said(pool, "b")  # what was asked for stays asked for
        assert loaded(pool) == ["b"]
        assert pool.find("b").timer is None

    drive(body, folder, keep_alive=0)


def test_unload_at_once_or_with_the_last_use(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        entry, was = await pool.unload("a")
        assert not was
        await said(pool, "a")
        pid = entry.worker.pid if entry.worker else 0
        assert (await pool.unload("a"))[1]
        assert entry.state is State.UNLOADED
        assert not Path(f"/proc/{pid}").exists()
        async with pool.lease("a") as lease:
            assert (await pool.unload("a"))[1]
            assert entry.leaving
            assert await answer(lease, "to the end") == "to the end"
        await until(entry, State.UNLOADED)
        assert await said(pool, "a") == "hello"
        assert not entry.leaving
        assert loaded(pool) == ["a"]

    drive(body, folder)


def test_a_request_during_an_unload_gets_a_fresh_process(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        await said(pool, "a")
        entry = pool.find("a")
        old = entry.worker
        unloading = asyncio.ensure_future(pool.unload("a"))
        await until(entry, State.UNLOADED)
        assert await said(pool, "a") == "hello"
        await unloading
        assert entry.worker is not old

    drive(body, folder)


def test_warm_loads_and_says_if_it_was_there(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        assert not (await pool.warm("a"))[1]
        assert (await pool.warm("a"))[1]
        with pytest.raises(errors.ModelNotFound):
            await pool.warm("z")

    drive(body, folder)


def test_a_file_that_vanished_costs_no_process(tmp_path: Path) -> None:
    path = make.llama(tmp_path / "a.gguf", n_embd=64)

    async def body(pool: Pool) -> None:
        async with pool.lease("a") as lease:
            path.rename(tmp_path / "away")
            await pool.look()
            assert await answer(lease, "mapped still") == "mapped still"
        await said(pool, "a")  # it stays loaded
        await pool.unload("a")
        with pytest.raises(errors.ModelNotFound, match="is gone"):
            await said(pool, "a")
        (tmp_path / "away").rename(path)
        assert await said(pool, "a") == "hello"
        await pool.unload("a")
        path.unlink()  # nobody has looked since
        with pytest.raises(errors.ModelNotFound, match="is gone"):
            await said(pool, "a")
        assert loaded(pool) == []

    drive(body, tmp_path, room=0)


def test_a_new_file_is_found_when_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    for name in NAMES:
        os.link(folder / f"{name}.gguf", tmp_path / f"{name}.gguf")

    async def body(pool: Pool) -> None:
        with pytest.raises(errors.ModelNotFound):
            await said(pool, "org/new")
        (tmp_path / "org").mkdir()
        os.link(folder / "a.gguf", tmp_path / "org" / "new.gguf")
        assert await asyncio.gather(*(said(pool, "org/new") for _ in range(5))) == ["hello"] * 5

    drive(body, tmp_path)


def test_of_many_who_look_at_once_few_do(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        before = pool.catalog.begun
        found = await asyncio.gather(*(said(pool, f"x{i}") for i in range(50)), return_exceptions=True)
        assert all(isinstance(error, errors.ModelNotFound) for error in found)
        assert pool.catalog.begun - before <= 2

    drive(body, folder)


def test_a_fault_of_ours_is_an_error_and_no_loop(folder: Path) -> None:
    calls = 0

    def faulty(model: Model) -> wire.Load:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise ZeroDivisionError("ours")
        return load(model)

    async def body(pool: Pool) -> None:
        nonlocal calls
        pool.find("a")
        calls = 100
        with pytest.raises(errors.InternalError, match="log says why"):
            await said(pool, "a")
        calls = 0
        assert await said(pool, "a") == "hello"

    drive(body, folder, make_load=faulty)


def test_random_uses_never_break_the_budget(folder: Path) -> None:
    draw = random.Random(7)

    async def body(pool: Pool) -> None:
        budget, most = pool.budget(), 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, sum(entry.need.total for entry in pool.entries if entry.holds))
                for entry in pool.entries:
                    assert not entry.uses or entry.state is not State.READY or entry.worker is not None
                await asyncio.sleep(0.001)

        async def client(number: int) -> int:
            answered = 0
            for _ in range(8):
                name, keep = draw.choice(NAMES), draw.choice([None, 0.0, 0.01, FOREVER])
                work = asyncio.ensure_future(said(pool, name, f"{number}", keep))
                if draw.random() < 0.2:
                    await asyncio.sleep(draw.random() * 0.1)
                    work.cancel()
                    await asyncio.wait({work})
                else:
                    assert await work == f"{number}"
                    answered += 1
                if draw.random() < 0.1:
                    await pool.unload(draw.choice(NAMES))
            return answered

        watching = asyncio.ensure_future(watch())
        assert sum(await asyncio.gather(*(client(i) for i in range(6)))) > 20
        assert not watching.done()
        watching.cancel()
        assert 0 < most <= budget
        assert all(entry.uses == 0 for entry in pool.entries)

    drive(body, folder, room=2.2)


def test_a_process_that_is_killed_while_it_loads_is_started_again(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        entry = pool.find("a")
        killed: list[int] = []
        real = asyncio.create_subprocess_exec

        async def dying(*command: Any, **more: Any) -> Any:
            process = await real(*command, **more)
            if len(killed) < DEATHS - 1:
                killed.append(process.pid)
                process.kill()
            return process

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio, "create_subprocess_exec", dying)
            assert await said(pool, "a") == "hello"
        assert entry.n_deaths == len(killed) == DEATHS - 1

    drive(body, folder)


def test_a_model_that_two_clients_take_away_at_once_is_taken_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(pool: Pool) -> None:
        monkeypatch.setattr(pool.catalog, "forget", lambda name: None)
        await said(pool, "a")
        await asyncio.gather(pool.forget("a"), pool.forget("a"))
        assert [entry.model.name for entry in pool.entries] == ["default"]

    drive(body, folder)


def test_a_model_taken_away_while_it_makes_room_is_no_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(pool: Pool) -> None:
        monkeypatch.setattr(pool.catalog, "forget", lambda name: None)
        await said(pool, "a")
        await said(pool, "b")
        pool._budget = need(folder)  # for one of the three: two must go
        worker = pool.find("a").worker
        assert worker is not None
        os.kill(worker.pid, signal.SIGSTOP)  # it takes its time to leave
        asking = asyncio.ensure_future(said(pool, "c"))
        await until(pool.find("a"), State.UNLOADED)
        await pool.forget("b")
        assert await asking == "hello"

    drive(body, folder, room=3)
