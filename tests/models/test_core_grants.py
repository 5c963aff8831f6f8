"""Cores of busy workers: the shares, the messages that carry them, and two real models side by side."""

import asyncio
import json
import os
import random
import signal
from collections.abc import Callable, Coroutine, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import architectures, fixtures
from tests.engines import make
from tests.models.workers import ask, run, script, scripted
from tests.serving import serve, wait_until
from tinyoai import wire
from tinyoai.host import cores
from tinyoai.models import core_grants
from tinyoai.models.catalog import Catalog
from tinyoai.models.core_grants import share
from tinyoai.models.pool import Pool
from tinyoai.models.registry import Model
from tinyoai.models.worker import Worker

NAMES = ("a", "b", "c")
HOLD, RELEASE, THREADS = script(hold=True), script(release=True), script(threads=True)


@pytest.mark.parametrize(
    ("n_cores", "n_busy", "most", "expected"),
    [
        (8, 1, 0, 8),
        (8, 2, 0, 4),
        (8, 3, 0, 2),
        (8, 8, 0, 1),
        (8, 20, 0, 1),
        (2, 2, 0, 1),
        (1, 1, 0, 1),
        (8, 1, 3, 3),
        (8, 2, 3, 3),
        (8, 4, 3, 2),
        (8, 2, 6, 4),
        (2, 1, 5, 5),
        (2, 2, 5, 1),
    ],
)
def test_shares(n_cores: int, n_busy: int, most: int, expected: int) -> None:
    assert share(n_cores, n_busy, most) == expected


@given(st.integers(1, 256), st.integers(2, 64), st.integers(0, 256))
def test_shares_together_are_never_more_than_the_machine_has(n_cores: int, n_busy: int, most: int) -> None:
    n = share(n_cores, n_busy, most)
    assert 1 <= n <= (most or n_cores)
    assert n_busy * n <= max(n_cores, n_busy)


# -- the messages --------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the workers run the scripted worker on a machine of 8 cores, and count as idle at once."""
    monkeypatch.setattr(core_grants, "LINGER_S", 0.0)
    monkeypatch.setattr(cores, "available", lambda: 8)
    with scripted():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three models."""
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        make.llama(folder / f"{name}.gguf")
    return folder


def drive(body: Callable[[Pool], Coroutine[Any, Any, None]], folder: Path, n_threads: int = 0) -> None:
    """Runs a test with a pool of three models."""

    def load(model: Model) -> wire.Load:
        return wire.Load(path=model.path, name=model.name, engine="", n_slots=2, n_threads=n_threads)

    async def work() -> None:
        pool = Pool(
            Catalog(Model(name="default", path=""), folder=str(folder), register=False), load, timeout=30
        )
        await pool.rescan()
        try:
            await body(pool)
        finally:
            await pool.stop()

    run(work())


async def hold(pool: Pool, name: str) -> "asyncio.Task[str]":
    """Gives a model a request that stays open, and returns its answer's task once it has a slot."""
    known = pool.find(name).worker
    before = known.n_running if known is not None else 0
    task = asyncio.ensure_future(ask(pool, HOLD, name))
    while (worker := pool.find(name).worker) is None or worker.n_running == before:
        await asyncio.sleep(0.001)
    return task


def worker_of(pool: Pool, name: str) -> Worker:
    """The worker of a loaded model."""
    worker = pool.find(name).worker
    assert worker is not None
    return worker


async def grants(pool: Pool, name: str) -> list[int]:
    """The numbers of threads that a model's worker was sent so far. The question makes it busy."""
    return [n for _, n in json.loads(await ask(pool, THREADS, name))]


def test_a_grant_precedes_the_request_that_needs_it(folder: Path, stand_in: None) -> None:
    async def body(pool: Pool) -> None:
        first = await hold(pool, "a")
        assert json.loads(await ask(pool, THREADS, "b")) == [[0, 4]]
        assert worker_of(pool, "a").n_threads == 8
        # the first one's grants: before its first request, then before and after the other's request
        assert json.loads(await ask(pool, THREADS, "a")) == [[0, 8], [1, 4], [1, 8]]
        await ask(pool, RELEASE, "a")
        await first

    drive(body, folder)


def test_an_idle_worker_gets_no_message(folder: Path, stand_in: None) -> None:
    async def body(pool: Pool) -> None:
        assert await grants(pool, "a") == [8]
        held = [await hold(pool, name) for name in ("b", "c")]
        assert worker_of(pool, "a").n_threads == 8
        # three are busy while it answers
        assert await grants(pool, "a") == [8, 2]
        for name in ("b", "c"):
            await ask(pool, RELEASE, name)
        await asyncio.gather(*held)
        assert await grants(pool, "a") == [8, 2, 8]

    drive(body, folder)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_busy_and_idle(folder: Path, stand_in: None, seed: int) -> None:
    draw = random.Random(seed)

    async def body(pool: Pool) -> None:
        held: dict[str, list[asyncio.Task[str]]] = {name: [] for name in NAMES}
        for _ in range(25):
            name = draw.choice(NAMES)
            if held[name] and draw.random() < 0.5:
                await ask(pool, RELEASE, name)
                await asyncio.gather(*held[name])
                held[name].clear()
            else:
                held[name].append(await hold(pool, name))
            busy = [name for name in NAMES if held[name]]
            assert {worker_of(pool, name).n_threads for name in busy} == ({8 // len(busy)} if busy else set())
        for name in NAMES:
            await ask(pool, RELEASE, name)
            await asyncio.gather(*held[name])
        for name in NAMES:
            sent = await grants(pool, name)
            assert sent[-1] == worker_of(pool, name).n_threads == 8
            assert all(before != after for before, after in pairwise(sent))

    drive(body, folder)


def test_a_stated_number_is_the_most(folder: Path, stand_in: None) -> None:
    async def body(pool: Pool) -> None:
        held = []
        for name, expected in zip(NAMES, (3, 3, 2), strict=True):
            held.append(await hold(pool, name))
            assert worker_of(pool, name).n_threads == expected
        for name in NAMES:
            await ask(pool, RELEASE, name)
        await asyncio.gather(*held)
        # the last one to be idle was alone before
        assert await grants(pool, "c") == [2, 3]

    drive(body, folder, n_threads=3)


def test_tokenizing_takes_no_cores_from_others(folder: Path, stand_in: None) -> None:
    async def body(pool: Pool) -> None:
        held = await hold(pool, "a")
        async with pool.lease("b") as lease:
            await lease.ready()
            source = lease.run([wire.Tokenize(prompt=[wire.Text(script(silent=True))])])
            asking = asyncio.ensure_future(anext(source))
            while not worker_of(pool, "b").n_open:
                await asyncio.sleep(0.001)
            assert worker_of(pool, "a").n_threads == 8
            asking.cancel()
            await asyncio.wait({asking})
            await source.aclose()
        await ask(pool, RELEASE, "a")
        await held
        assert await grants(pool, "a") == [8]

    drive(body, folder)


def test_a_worker_that_dies_gives_its_cores_back(
    folder: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(pool: Pool) -> None:
        first, second = await hold(pool, "a"), await hold(pool, "b")
        assert worker_of(pool, "a").n_threads == 4
        dead = worker_of(pool, "b")
        with monkeypatch.context() as patch:
            patch.setattr(core_grants, "LINGER_S", 30.0)  # for a dead worker nothing lingers
            os.kill(dead.pid, signal.SIGKILL)
            await asyncio.wait({second})
            assert worker_of(pool, "a").n_threads == 8
        while (worker := pool.find("b").worker) is None or worker is dead:
            await asyncio.sleep(0.001)
        # the new process knows of no grant, and gets one with its first request
        assert worker.n_threads == 0
        assert json.loads(await ask(pool, THREADS, "b")) == [[0, 4]]
        await ask(pool, RELEASE, "a")
        await first
        assert await grants(pool, "a") == [8, 4, 8, 4, 8]

    drive(body, folder)


def test_a_request_that_is_sent_again_is_preceded_by_a_grant(
    folder: Path, stand_in: None, tmp_path: Path
) -> None:
    async def body(pool: Pool) -> None:
        first = await hold(pool, "a")
        # the first process dies silently in the middle of its grant; the request was not started
        text = script(first=str(tmp_path / "died"), threads=True)
        assert json.loads(await ask(pool, text, "b")) == [[0, 4]]
        assert pool.find("b").n_deaths == 1
        await ask(pool, RELEASE, "a")
        await first
        assert await grants(pool, "a") == [8, 4, 8, 4, 8]

    drive(body, folder)


def test_a_short_pause_between_requests_changes_nothing(
    folder: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_grants, "LINGER_S", 0.5)

    async def body(pool: Pool) -> None:
        first = await hold(pool, "a")
        for _ in range(5):
            await ask(pool, "hello", "b")
            assert worker_of(pool, "a").n_threads == 4
        while worker_of(pool, "a").n_threads == 4:
            await asyncio.sleep(0.001)
        await ask(pool, RELEASE, "a")
        await first
        assert await grants(pool, "a") == [8, 4, 8]

    drive(body, folder)


# -- real models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_threads", [0, 1])
def test_two_real_models_share_the_cores(tmp_path: Path, n_threads: int) -> None:
    chat = fixtures.require(fixtures.smollm2(), "SmolLM2-135M-Instruct")
    for path, name in ((chat, "chat"), (architectures.model("llama-embed"), "embed")):
        (tmp_path / f"{name}.gguf").symlink_to(path)
    n = cores.available()
    flags = ("--models-dir", str(tmp_path), "--ctx-size", "512", "--threads", str(n_threads))

    with serve("--model", str(tmp_path / "chat.gguf"), "--engine", "llamacpp", *flags) as server:

        def threads() -> dict[str, int | None]:
            data = server.get("/v1/models/status").json["data"]
            return {row["id"]: row["threads"] for row in data}

        assert threads() == {"chat": None, "embed": None}
        first = server.post("/v1/embeddings", model="embed", input="a cat").json["data"][0]["embedding"]
        assert threads() == {"chat": None, "embed": n_threads or n}
        body = {"model": "chat", "max_tokens": 400, "ignore_eos": True, "stream": True, "prompt": "A cat"}
        with server.connect() as stream:
            raw = json.dumps(body).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            stream.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
            received = stream.recv(1 << 16)
            while b'"text"' not in received:
                received += stream.recv(1 << 16)
            # the other answers meanwhile, as it did alone
            again = server.post("/v1/embeddings", model="embed", input="a cat").json["data"][0]["embedding"]
            assert again == pytest.approx(first, abs=1e-3)
            shared = 1 if n_threads else max(1, n // 2)
            assert threads() == {"chat": shared, "embed": shared}
            # soon after that the chat model has the machine for itself again
            wait_until(lambda: threads()["chat"] == (n_threads or n))
            # and it goes on with all of them
            n_before = len(received)
            while len(received) < n_before + 2000:
                received += stream.recv(1 << 16)
            assert b"[DONE]" not in received
