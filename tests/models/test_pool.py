"""Several models at once: loaded on use, kept within a memory budget, evicted in order, never while leased.

The workers are scripted processes; the files are real, for their names and sizes.
"""

import asyncio
import os
import random
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from tests.engines import make
from tests.models.workers import ask, run, scripted, text_of, until
from tinyoai import errors, wire
from tinyoai.engine.facts import CONTEXT_STEP, MemoryEstimate
from tinyoai.host import memory
from tinyoai.models import managed_model
from tinyoai.models.catalog import Catalog
from tinyoai.models.model_status import State
from tinyoai.models.pool import FOREVER, Pool
from tinyoai.models.registry import Model

DEFAULT = Model(name="default", path="")
NAMES = ("a", "b", "c")
PER_TOKEN = 1000
FIXED = 1_000_000


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the workers run the scripted worker, with simple memory estimates."""
    monkeypatch.setattr(
        managed_model,
        "estimate",
        lambda model, load: MemoryEstimate(FIXED + load.cache_ram, PER_TOKEN, load.n_ctx),
    )
    with scripted():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three models of one size."""
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        make.llama(folder / f"{name}.gguf", n_embd=64, n_ctx=512)
    return folder


def load(model: Model, n_ctx: int = 512) -> wire.Load:
    """Returns the Load of a model."""
    return wire.Load(path=model.path, name=model.name, engine="", n_ctx=n_ctx, n_slots=2)


def size(n_ctx: int = 512) -> int:
    """Returns the bytes that one of the models takes."""
    return FIXED + PER_TOKEN * n_ctx


Body = Callable[[Pool], Coroutine[Any, Any, None]]


def drive(body: Body, folder: Path, *, room: float = 0, keep_alive: float = FOREVER, **more: Any) -> None:
    """Runs a test with a pool whose budget is `room` of the three models. Checks that no worker remains."""

    async def work() -> None:
        catalog = Catalog(DEFAULT, folder=str(folder), register=False)
        pool = Pool(
            catalog,
            more.get("make_load", load),
            budget=int(room * size()),
            keep_alive=keep_alive,
            timeout=30,
        )
        await pool.rescan()
        try:
            await body(pool)
        finally:
            pids = [model.worker.pid for model in pool.models if model.worker is not None]
            await pool.stop()
            for pid in pids:
                assert not Path(f"/proc/{pid}").exists()

    run(work())


def loaded(pool: Pool) -> list[str]:
    """Returns the names of the loaded models."""
    return sorted(model.name for model in pool.models if model.state is State.READY)


def pid_of(pool: Pool, name: str) -> int:
    """Returns the pid of a loaded model's process."""
    worker = pool.find(name).worker
    assert worker is not None
    return worker.pid


def test_models_are_loaded_on_first_use_and_run_side_by_side(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        assert loaded(pool) == []
        assert await asyncio.gather(*(ask(pool, name, name) for name in NAMES)) == list(NAMES)
        assert loaded(pool) == list(NAMES)
        assert len({pid_of(pool, name) for name in NAMES}) == 3

    drive(body, folder)


def test_many_first_uses_start_one_process(folder: Path) -> None:
    started: list[str] = []

    def counting(model: Model) -> wire.Load:
        started.append(model.name)
        return load(model)

    async def body(pool: Pool) -> None:
        answers = await asyncio.gather(*(ask(pool, str(i), "a") for i in range(8)))
        assert answers == [str(i) for i in range(8)]
        assert started.count("a") == 2  # one for the ManagedModel and one for its load

    drive(body, folder, make_load=counting)


def test_the_least_recently_used_model_makes_room(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        for name in ("a", "b", "a", "c"):
            assert await ask(pool, "hello", name, keep_alive=600) == "hello"
        assert loaded(pool) == ["a", "c"]
        assert pool.find("b").status().unloads_in_s is None
        assert await ask(pool, "hello", "b") == "hello"
        assert loaded(pool) == ["b", "c"]

    drive(body, folder, room=2.5)


async def until_it_waits(pool: Pool, name: str) -> None:
    """Returns when a load waits for memory."""
    while "waits" not in pool.find(name).reason:
        await pool.find(name).changed.wait()


def test_a_load_waits_for_a_leased_model_instead_of_evicting_it(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        async with pool.lease("a") as lease:
            await lease.ready()
            pid = pid_of(pool, "a")
            waiting = asyncio.ensure_future(ask(pool, "hello", "b"))
            await until_it_waits(pool, "b")
            assert await text_of(lease, "still here") == "still here"
            assert pid_of(pool, "a") == pid
            assert not waiting.done()
        assert await waiting == "hello"
        assert loaded(pool) == ["b"]

    drive(body, folder, room=1.5)


def test_a_request_that_gives_up_waiting_leaves_nothing_behind(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        async with pool.lease("a") as lease:
            await lease.ready()
            waiting = asyncio.ensure_future(ask(pool, "hello", "b"))
            await until_it_waits(pool, "b")
            waiting.cancel()
            await asyncio.wait({waiting})
        await until(pool.find("b"), State.UNLOADED)
        assert pool.find("b").n_leases == 0
        assert loaded(pool) == ["a"]
        assert await ask(pool, "hello", "b") == "hello"

    drive(body, folder, room=1.5)


def test_a_model_that_does_not_fit_is_refused_with_the_context_that_would(folder: Path) -> None:
    n_ctx = 4096

    def wide(model: Model) -> wire.Load:
        return load(model, n_ctx)

    async def body(pool: Pool) -> None:
        nonlocal n_ctx
        async with pool.lease("b") as lease:
            with pytest.raises(errors.InsufficientMemory) as caught:
                await lease.ready()
        assert caught.value.status == 503
        assert caught.value.code == "insufficient_memory"
        assert caught.value.headers == {"x-should-retry": "false"}
        assert pool.find("b").state is State.UNLOADED
        assert loaded(pool) == []  # no model was unloaded or started for it
        fits = int(caught.value.message.partition("a context of ")[2].split()[0])
        assert fits % CONTEXT_STEP == 0
        n_ctx = fits + CONTEXT_STEP
        with pytest.raises(errors.InsufficientMemory):
            await ask(pool, "hello", "b")
        n_ctx = fits
        assert await ask(pool, "hello", "b") == "hello"

    drive(body, folder, room=1.0, make_load=wide)


def test_if_no_context_fits_the_error_recommends_another_model(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        with pytest.raises(errors.InsufficientMemory, match="smaller or more quantized"):
            await ask(pool, "hello", "a")

    drive(body, folder, room=0.1)


def test_a_temporary_shortage_of_memory_can_be_retried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(pool: Pool) -> None:
        monkeypatch.setattr(memory, "available", lambda: size() // 2)
        async with pool.lease("a") as lease:
            with pytest.raises(errors.InsufficientMemory) as caught:
                await lease.ready()
            assert caught.value.code == "insufficient_memory"
            assert caught.value.headers == {"retry-after": "10"}
            # the same error as an event of a run
            failed = [event async for _, event in lease.run([wire.Tokenize(prompt=[])])]
            assert isinstance(failed[0], wire.Failed)
            again = errors.by_name(
                failed[0].kind, "", param=None, code=failed[0].code, retry_after=failed[0].retry_after
            )
            assert again.headers == {"retry-after": "10"}
            monkeypatch.setattr(memory, "available", lambda: 10 * size())
            assert await text_of(lease, "hello") == "hello"

    drive(body, folder)


def test_the_cache_of_conversations_gives_way_to_the_model(folder: Path) -> None:
    def greedy(model: Model) -> wire.Load:
        return structs.replace(load(model), cache_ram=size())

    async def body(pool: Pool) -> None:
        model = pool.find("a")
        assert model.estimate.total == 2 * size()
        assert await ask(pool, "hello", "a") == "hello"
        assert (model.load.cache_ram, model.estimate.total) == (0, size())

    drive(body, folder, room=1.0, make_load=greedy)

    async def kept(pool: Pool) -> None:
        assert await ask(pool, "hello", "a") == "hello"
        assert pool.find("a").load.cache_ram == size()

    drive(kept, folder, room=2.0, make_load=greedy)


@pytest.mark.parametrize("early", [True, False])
def test_a_stop_in_a_hurry_does_not_wait_for_workers_that_save(folder: Path, early: bool) -> None:
    def saving(model: Model) -> wire.Load:
        return structs.replace(load(model), cache_dir="/nonexistent")

    async def body(pool: Pool) -> None:
        assert await ask(pool, "hello", "a") == "hello"
        os.kill(pid_of(pool, "a"), signal.SIGSTOP)  # it takes all of its time
        begin = asyncio.get_running_loop().time()
        if early:
            pool.hurry()
        stopping = asyncio.ensure_future(pool.stop())
        await asyncio.sleep(0.2)
        if not early:
            assert not stopping.done()
            pool.hurry()
        await stopping
        assert asyncio.get_running_loop().time() - begin < 2.0

    drive(body, folder, make_load=saving)


def test_a_file_larger_than_the_machine_s_memory_never_fits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(pool: Pool) -> None:
        monkeypatch.setattr(memory, "available", lambda: size() // 2)
        monkeypatch.setattr(memory, "capacity", lambda: 100)
        async with pool.lease("a") as lease:
            with pytest.raises(errors.InsufficientMemory) as caught:
                await lease.ready()
        assert not isinstance(caught.value, errors.MemoryShortage)
        assert caught.value.headers == {"x-should-retry": "false"}
        assert loaded(pool) == []

    drive(body, folder)


def test_a_load_is_noted_in_the_catalog(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        assert await ask(pool, "hello", "a") == "hello"
        async with asyncio.timeout(10):
            while pool.catalog.view.models["a"].loaded is None:
                await asyncio.sleep(0.01)
        assert pool.catalog.view.models["b"].loaded is None

    drive(body, folder)


def test_the_keep_alive_of_the_pool_applies_unless_a_request_has_one(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        await ask(pool, "hello", "a")
        await until(pool.find("a"), State.UNLOADED)
        await ask(pool, "hello", "b", keep_alive=FOREVER)
        await ask(pool, "hello", "b")  # the keep-alive of the request still applies
        assert loaded(pool) == ["b"]
        assert pool.find("b").status().unloads_in_s is None

    drive(body, folder, keep_alive=0)


def test_unload_immediately_or_with_the_last_lease(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        model, was_loaded = await pool.unload("a")
        assert not was_loaded
        await ask(pool, "hello", "a")
        pid = pid_of(pool, "a")
        assert await pool.unload("a") == (model, True)
        assert model.state is State.UNLOADED
        assert not Path(f"/proc/{pid}").exists()
        async with pool.lease("a") as lease:
            await lease.ready()
            assert await pool.unload("a") == (model, True)
            assert model.unload_pending
            assert await text_of(lease, "to the end") == "to the end"
        await until(model, State.UNLOADED)
        assert await ask(pool, "hello", "a") == "hello"
        assert not model.unload_pending
        assert loaded(pool) == ["a"]

    drive(body, folder)


def test_a_request_during_an_unload_gets_a_fresh_process(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        await ask(pool, "hello", "a")
        model = pool.find("a")
        old = model.worker
        unloading = asyncio.ensure_future(pool.unload("a"))
        await until(model, State.UNLOADED)
        assert await ask(pool, "hello", "a") == "hello"
        await unloading
        assert model.worker is not old

    drive(body, folder)


def test_preload_loads_and_returns_whether_it_was_loaded(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        assert not (await pool.preload("a"))[1]
        assert (await pool.preload("a"))[1]
        with pytest.raises(errors.ModelNotFound):
            await pool.preload("z")

    drive(body, folder)


def test_no_process_is_started_for_a_missing_file(tmp_path: Path) -> None:
    path = make.llama(tmp_path / "a.gguf", n_embd=64)

    async def body(pool: Pool) -> None:
        async with pool.lease("a") as lease:
            await lease.ready()
            path.rename(tmp_path / "away")
            await pool.rescan()
            assert await text_of(lease, "mapped still") == "mapped still"
        await ask(pool, "hello", "a")  # a loaded model stays loaded
        await pool.unload("a")
        with pytest.raises(errors.ModelNotFound, match="is gone"):
            await ask(pool, "hello", "a")
        (tmp_path / "away").rename(path)
        assert await ask(pool, "hello", "a") == "hello"
        await pool.unload("a")
        path.unlink()  # there was no scan since
        async with pool.lease("a") as lease:
            with pytest.raises(errors.ModelNotFound, match="is gone"):
                await lease.ready()
        assert loaded(pool) == []

    drive(body, tmp_path)


def test_a_new_file_is_found_on_request(folder: Path, tmp_path: Path) -> None:
    for name in NAMES:
        os.link(folder / f"{name}.gguf", tmp_path / f"{name}.gguf")

    async def body(pool: Pool) -> None:
        with pytest.raises(errors.ModelNotFound):
            await ask(pool, "hello", "org/new")
        (tmp_path / "org").mkdir()
        os.link(folder / "a.gguf", tmp_path / "org" / "new.gguf")
        answers = await asyncio.gather(*(ask(pool, "hello", "org/new") for _ in range(5)))
        assert answers == ["hello"] * 5

    drive(body, tmp_path)


def test_concurrent_requests_for_unknown_models_share_a_scan(folder: Path) -> None:
    async def body(pool: Pool) -> None:
        before = pool.catalog.begun
        found = await asyncio.gather(
            *(ask(pool, "hello", f"x{i}") for i in range(50)), return_exceptions=True
        )
        assert all(isinstance(error, errors.ModelNotFound) for error in found)
        assert pool.catalog.begun - before <= 2

    drive(body, folder)


def test_an_internal_fault_at_load_is_an_error_and_no_loop(folder: Path) -> None:
    faulty = False

    def make_load(model: Model) -> wire.Load:
        if faulty:
            raise ZeroDivisionError("internal")
        return load(model)

    async def body(pool: Pool) -> None:
        nonlocal faulty
        pool.find("a")
        faulty = True
        async with pool.lease("a") as lease:
            with pytest.raises(errors.InternalError, match="see the server's log"):
                await lease.ready()
        faulty = False
        assert await ask(pool, "hello", "a") == "hello"

    drive(body, folder, make_load=make_load)


def test_random_uses_never_break_the_budget(folder: Path) -> None:
    draw = random.Random(7)

    async def body(pool: Pool) -> None:
        budget, most = pool.budget(), 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, sum(model.estimate.total for model in pool.models if model.reserved))
                for model in pool.models:
                    assert not model.n_leases or model.state is not State.READY or model.worker is not None
                await asyncio.sleep(0.001)

        async def client(number: int) -> int:
            answered = 0
            for _ in range(8):
                name, keep = draw.choice(NAMES), draw.choice([None, 0.0, 0.01, FOREVER])
                work = asyncio.ensure_future(ask(pool, f"{number}", name, keep))
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
        assert all(model.n_leases == 0 for model in pool.models)
        for name in NAMES:  # each unloads at once, so no count of leases is too high
            model, _ = await pool.unload(name)
            assert not model.loaded

    drive(body, folder, room=2.2)


def test_a_model_that_two_clients_unregister_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(pool: Pool) -> None:
        monkeypatch.setattr(pool.catalog, "forget", lambda name: None)
        await ask(pool, "hello", "a")
        await asyncio.gather(pool.unregister("a"), pool.unregister("a"))
        assert [model.name for model in pool.models] == ["default"]

    drive(body, folder)


def test_a_model_that_is_unregistered_while_another_makes_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyoai.models.worker.STOP_S", 0.2)

    async def body(pool: Pool) -> None:
        monkeypatch.setattr(pool.catalog, "forget", lambda name: None)
        await ask(pool, "hello", "a")
        await ask(pool, "hello", "b")
        pool._budget = size()  # the budget is for one of the three: two must be unloaded
        os.kill(pid_of(pool, "a"), signal.SIGSTOP)  # the unload takes a moment
        asking = asyncio.ensure_future(ask(pool, "hello", "c"))
        await until(pool.find("a"), State.UNLOADED)
        await pool.unregister("b")
        assert await asking == "hello"

    drive(body, folder, room=3)
