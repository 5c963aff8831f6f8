"""The law of the wire as the server keeps it, and real worker processes that die, hang and refuse."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai import errors, wire
from tinyoai.models.catalog import Catalog
from tinyoai.models.pool import DEATHS, WINDOW_S, Pool, State, verdict
from tinyoai.models.registry import Model
from tinyoai.models.worker import Books, Call, LoadError, Worker

FAKE = wire.Load(path="", name="fake", engine="fake", n_slots=2)


def generate(text: str, **fields: Any) -> Callable[[int], wire.Generate]:
    """A Generate in the making, with the scripted engine's prompt."""
    prompt: list[wire.Segment] = [wire.Special("bos"), wire.Text(text + "\n")]
    return lambda call_id: wire.Generate(
        id=call_id, prompt=prompt, sampling=wire.Sampling(temperature=0), **fields
    )


def run(work: Coroutine[Any, Any, None]) -> None:
    """One test's own event loop."""
    asyncio.run(asyncio.wait_for(work, 60))


async def text(call: Call) -> tuple[str, wire.Event]:
    """All its text, and its last event."""
    said, event = "", None
    async for event in call:
        if isinstance(event, wire.Delta):
            said += event.text
    assert event is not None
    return said, event


# -- the books -------------------------------------------------------------------------------------


EVENTS: list[Callable[[int], wire.Event]] = [
    lambda i: wire.Accepted(id=i, n_prompt=1, n_cached=0),
    lambda i: wire.Delta(id=i, text="x"),
    lambda i: wire.Done(
        id=i, finish_reason="stop", n_prompt=1, n_cached=0, n_generated=1, prompt_ms=0, predicted_ms=0
    ),
    lambda i: wire.Failed(id=i, kind="ModelError", message="no"),
    lambda i: wire.Vector(id=i, values=b"\0\0\0\0"),
    lambda i: wire.Tokens(id=i, ids=[]),
    lambda i: wire.Plain(id=i, text=""),
]


@given(
    st.lists(
        st.one_of(
            st.just(("begin", 0, 0)),
            st.tuples(st.just("event"), st.integers(-1, 6), st.integers(0, len(EVENTS) - 1)),
            st.tuples(st.just("cancel"), st.integers(0, 6), st.just(0)),
            st.just(("death", 0, 0)),
        ),
        max_size=60,
    )
)
def test_every_call_ends_exactly_once_whatever_a_worker_says(actions: list[tuple[str, int, int]]) -> None:
    async def drive() -> None:
        books, calls = Books(), list[Call]()
        for action, number, kind in actions:
            if action == "begin":
                calls.append(books.begin(lambda call: books.drop(call, "left")))
            elif action == "event":
                try:
                    books.receive(EVENTS[kind](number))
                except wire.WireError:
                    books.fail_all("spoke out of turn")
            elif action == "cancel" and number < len(calls):
                calls[number].cancel()
            elif action == "death":
                books.fail_all("died")
        books.fail_all("the end")
        for call in calls:
            events = [event async for event in call]
            ends = [e for e in events if isinstance(e, wire.Last)]
            assert len(ends) == 1
            assert events[-1] is ends[0]
            accepted = [i for i, e in enumerate(events) if isinstance(e, wire.Accepted)]
            assert accepted in ([], [0])
            if any(isinstance(e, wire.Delta | wire.Vector | wire.Done) for e in events):
                assert accepted == [0]

    run(drive())


@pytest.mark.parametrize(
    "event",
    [
        wire.Delta(id=1, text="early"),
        wire.Vector(id=1, values=b""),
        wire.Accepted(id=2, n_prompt=1, n_cached=0),
        wire.Delta(id=0, text="to nobody"),
    ],
)
def test_a_worker_that_breaks_the_law_is_caught(event: wire.Event) -> None:
    async def drive() -> None:
        books = Books()
        books.begin(lambda call: None)
        with pytest.raises(wire.WireError):
            books.receive(event)

    run(drive())


# -- real processes --------------------------------------------------------------------------------


def test_a_worker_answers_and_leaves() -> None:
    async def drive() -> None:
        worker = await Worker.start(FAKE, timeout=30)
        assert worker.ready.engine == "fake"
        said, event = await text(worker.call(generate("hello")))
        assert said == "hello"
        assert isinstance(event, wire.Done)
        await worker.stop()
        with pytest.raises(ProcessLookupError):
            os.kill(worker.pid, 0)

    run(drive())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_worker_that_is_killed_fails_its_calls_and_says_why(number: signal.Signals) -> None:
    async def drive() -> None:
        worker = await Worker.start(FAKE, timeout=30)
        call = worker.call(generate('!{"text": "x", "repeat": 3000, "step_ms": 1}'))
        await anext(call)
        os.kill(worker.pid, number)
        _, event = await text(call)
        assert isinstance(event, wire.Failed)
        assert event.kind == "WorkerDied"
        assert number.name in await worker.ended
        late = worker.call(generate("late"))
        assert isinstance((await text(late))[1], wire.Failed)
        await worker.stop()

    run(drive())


def test_a_worker_that_hangs_is_ended() -> None:
    async def drive() -> None:
        worker = await Worker.start(FAKE, timeout=30, stall_s=1.0)
        worker._longest = 0.0  # a slow machine's start must not lengthen the patience tested here
        _, event = await text(worker.call(generate('!{"text": "abc", "hang_at": 1}')))
        assert isinstance(event, wire.Failed)
        assert "no sign of life" in await worker.ended
        await worker.stop()

    run(drive())


def test_a_stopped_worker_does_not_hold_up_the_end() -> None:
    async def drive() -> None:
        worker = await Worker.start(FAKE, timeout=30)
        os.kill(worker.pid, signal.SIGSTOP)
        await worker.stop()
        assert worker.ended.done()

    run(drive())


def test_cancel_reaches_a_running_call_and_harms_no_other() -> None:
    async def drive() -> None:
        worker = await Worker.start(FAKE, timeout=30)
        long = worker.call(generate('!{"text": "x", "repeat": 3000, "step_ms": 1}'))
        await anext(long)
        long.cancel()
        assert isinstance((await text(long))[1], wire.Failed)
        assert (await text(worker.call(generate("after"))))[0] == "after"
        assert worker.n_open == 0
        await worker.stop()

    run(drive())


def test_a_model_that_is_refused_says_why(tmp_path: Any) -> None:
    async def drive() -> None:
        path = tmp_path / "empty.gguf"
        path.write_bytes(b"")
        with pytest.raises(LoadError, match="empty"):
            await Worker.start(wire.Load(path=str(path), name="m", engine="ctransformers"), timeout=30)

    run(drive())


def test_a_load_that_takes_too_long_is_given_up() -> None:
    async def drive() -> None:
        with pytest.raises(LoadError, match="longer"):
            await Worker.start(FAKE, timeout=0.001)

    run(drive())


# -- the pool --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deaths", "now", "state", "delay"),
    [
        ([100.0], 100.0, State.WAITING, 0.2),
        ([99.0, 100.0], 100.0, State.WAITING, 1.0),
        ([98.0, 99.0, 100.0], 100.0, State.FAILED, 60.0),
        ([1.0, 2.0, 2.0 + WINDOW_S], 2.0 + WINDOW_S, State.WAITING, 0.2),
    ],
)
def test_what_follows_a_death(deaths: list[float], now: float, state: State, delay: float) -> None:
    found, seconds = verdict(deaths, now)
    assert found is state
    assert seconds == pytest.approx(delay)


def fake_pool() -> Pool:
    """A pool that knows the scripted engine alone."""
    return Pool(Catalog(Model(name="fake", path=""), register=False), lambda model: FAKE, timeout=30)


async def said(pool: Pool, request: str) -> str:
    """One request through the pool."""
    async with pool.lease("fake") as lease:
        parts = []
        async for event in lease.call(generate(request)):
            if isinstance(event, wire.Delta):
                parts.append(event.text)
            elif isinstance(event, wire.Failed):
                raise errors.by_name(event.kind, event.message, param=None, code=None)
        return "".join(parts)


def test_a_killed_worker_is_started_again_and_then_given_up() -> None:
    async def drive() -> None:
        pool = fake_pool()
        assert await said(pool, "one") == "one"
        for _ in range(DEATHS - 1):
            with pytest.raises(errors.WorkerDied):
                await said(pool, '!{"text": "abc", "kill_at": 1}')
            assert await said(pool, "again") == "again"
        with pytest.raises(errors.WorkerDied):
            await said(pool, '!{"text": "abc", "kill_at": 1}')
        with pytest.raises(errors.ModelFailed):
            await said(pool, "now it has failed")
        pool.find("fake").retry_at = 0.0  # as if it had been left alone long enough
        pool.find("fake").deaths.clear()
        assert await said(pool, "cooled down") == "cooled down"
        await pool.stop()

    run(drive())


def test_a_request_that_no_worker_had_accepted_is_sent_once_more() -> None:
    async def drive() -> None:
        pool = fake_pool()
        await pool.first_load()
        worker = pool.find("fake").worker
        assert worker is not None
        os.kill(worker.pid, signal.SIGSTOP)  # it reads nothing more
        answer = asyncio.ensure_future(said(pool, "replayed"))
        await asyncio.sleep(0.1)
        os.kill(worker.pid, signal.SIGKILL)
        assert await answer == "replayed"
        await pool.stop()

    run(drive())


def test_an_unknown_model_is_named() -> None:
    pool = fake_pool()
    with pytest.raises(errors.ModelNotFound, match="'gpt-4'"):
        pool.find("gpt-4")


def test_it_does_not_end_by_the_signal_that_all_processes_of_a_service_get() -> None:
    async def body() -> None:
        worker = await Worker.start(FAKE, timeout=30)
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
        said, last = await text(worker.call(generate("hello")))
        assert (said, type(last)) == ("hello", wire.Done)
        await worker.stop()

    run(body())
