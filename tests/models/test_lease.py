"""Requests on a lease: merged in order of arrival, sent again if unstarted, cancelled together."""

import asyncio
import os
import signal
from collections.abc import Iterable
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.models.workers import (
    Sink,
    ask,
    drive,
    faulty,
    generate,
    pool_of,
    run,
    script,
    scripted,
    take_text,
    text_of,
    worker_of,
)
from tinyoai import errors, wire
from tinyoai.models import managed_model
from tinyoai.models import pool as pool_module
from tinyoai.models.pending_calls import EventQueue, PendingCall, PendingCalls
from tinyoai.models.pool import Lease, Pool

LOAD = wire.Load(path="", name="m", engine="", n_slots=2)
EMBEDDED = ["Started", "Queued", "Accepted", "Vector", "Done"]


def embed(text: str) -> wire.Embed:
    """Returns an Embed of a text."""
    return wire.Embed(prompt=[wire.Special("bos"), wire.Text(text)])


async def events_of(lease: Lease, bodies: list[wire.Body]) -> list[tuple[int, str]]:
    """Returns the body and kind of every event in order of arrival."""
    async with aclosing(lease.run(bodies)) as source:
        return [(index, type(event).__name__) async for index, event in source]


async def outcomes(lease: Lease, texts: list[str]) -> dict[int, str]:
    """Returns each request's kind of failure, or "Done"."""
    found = {}
    async with aclosing(lease.run([generate(text) for text in texts])) as source:
        async for index, event in source:
            if isinstance(event, wire.Final):
                assert index not in found
                found[index] = event.kind if isinstance(event, wire.Failed) else "Done"
    return found


# -- one worker --------------------------------------------------------------------------------------


def test_events_of_many_bodies_are_merged_and_keep_their_order() -> None:
    async def body(pool: Pool) -> None:
        async with pool.lease("fake") as lease:
            found = await events_of(lease, [embed("x" * (50 - n)) for n in range(50)])
            for n in range(50):
                assert [kind for index, kind in found if index == n] == EMBEDDED
            assert len(found) == 50 * len(EMBEDDED)
            # each body has a slot, so the second begins before the first is done
            assert found.index((1, "Started")) < found.index((0, "Done"))
            tokenize = wire.Tokenize(prompt=[wire.Text("a")])
            found = await events_of(lease, [tokenize, embed("b")])
            assert [kind for index, kind in found if index == 0] == ["Started", "Tokens", "Done"]
            assert [kind for index, kind in found if index == 1] == EMBEDDED
            assert await events_of(lease, []) == []

    drive(body)


def test_n_choices_are_one_request() -> None:
    async def body(pool: Pool) -> None:
        async with pool.lease("fake") as lease:
            kinds = [kind for _, kind in await events_of(lease, [generate("ab\n", n=3)])]
            assert kinds.count("Accepted") == kinds.count("Done") == 1
            assert kinds.count("ChoiceDone") == 3
            assert kinds.count("Content") == 6

    drive(body)


def test_closing_cancels_all() -> None:
    async def body(pool: Pool) -> None:
        worker = await worker_of(pool)
        slow = '!{"step_ms": 20}\n' + "x" * 3000
        async with pool.lease("fake") as lease:
            async with aclosing(lease.run([embed(slow)] * 20)) as source:
                await anext(source)
                assert worker.n_open == 20
            assert worker.n_open == 0
            # without a cancel, both slots would be busy for minutes
            assert await text_of(lease, "after\n") == "after"

    drive(body)


def test_the_generator_yields_what_the_sink_does_not_take() -> None:
    sink = Sink(take_text)

    async def body(pool: Pool) -> None:
        async with (
            pool.lease("m") as lease,
            aclosing(lease.run([generate(script(hold=True))], sink=sink)) as source,
        ):
            kinds = []
            async for _, event in source:
                kinds.append(type(event).__name__)
                if isinstance(event, wire.Accepted):  # the queue is empty now
                    await text_of(lease, script(say="direct"))
                    await text_of(lease, script(release=True))
        assert sink.text == "direct"
        assert kinds == ["Queued", "Accepted", "ChoiceDone", "Done"]

    with scripted():
        drive(body, LOAD)


def test_a_fault_in_the_sink_fails_that_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def body(pool: Pool) -> None:
        worker = await worker_of(pool)
        async with pool.lease("m") as lease:
            other = asyncio.ensure_future(text_of(lease, script(hold=True)))
            events = []
            async with aclosing(lease.run([generate(script(hold=True))], sink=Sink(faulty))) as source:
                async for _, event in source:
                    events.append(event)
                    if isinstance(event, wire.Accepted):
                        await text_of(lease, script(say="direct"))
            assert isinstance(events[-1], wire.Failed)
            assert events[-1].kind == "InternalError"
            await text_of(lease, script(release=True))
            assert await other == "direct"
        assert pool.default.worker is worker
        assert "could not be passed on" in caplog.text

    with scripted(), caplog.at_level("ERROR", "tinyoai.worker"):
        drive(body, LOAD)


# -- deaths ------------------------------------------------------------------------------------------


def test_requests_that_were_not_started_are_sent_again_and_no_others() -> None:
    async def body(pool: Pool) -> None:
        await pool.first_load()
        async with pool.lease("m") as lease:
            # the scripted worker reads the requests in order: the third kills it
            texts = [script(hold=True), "done", script(die="started"), "a", "b"]
            found = await outcomes(lease, texts)
            assert found == {0: "WorkerDied", 1: "Done", 2: "WorkerDied", 3: "Done", 4: "Done"}
        assert pool.default.n_deaths == 1

    with scripted():
        drive(body, LOAD)


def test_a_request_is_sent_again_as_often_as_needed(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        async with pool.lease("m") as lease:
            texts = [*(script(first=str(tmp_path / f"{n}")) for n in range(3)), "last"]
            assert await outcomes(lease, texts) == dict.fromkeys(range(4), "Done")
        assert pool.default.n_deaths == 3

    with scripted():
        drive(body, LOAD)


def test_a_request_that_no_worker_reads_is_sent_again() -> None:
    async def body(pool: Pool) -> None:
        worker = await worker_of(pool)
        os.kill(worker.pid, signal.SIGSTOP)
        answers = [asyncio.ensure_future(ask(pool, f"{n}\n")) for n in range(3)]
        while worker.n_open < 3:
            await asyncio.sleep(0)
        os.kill(worker.pid, signal.SIGKILL)
        assert await asyncio.gather(*answers) == ["0", "1", "2"]

    drive(body)


def test_a_prompt_that_kills_the_real_worker_is_not_sent_again() -> None:
    async def body(pool: Pool) -> None:
        async with pool.lease("fake") as lease:
            found = await outcomes(lease, ['!{"kill_at": 0}\n', *["x\n"] * 9])
            assert found[0] == "WorkerDied"
            assert list(found.values()).count("Done") >= 7  # only requests with a slot or in the tokenizer
        assert pool.default.n_deaths == 1
        assert await ask(pool, "the next one\n") == "the next one"

    drive(body)


def test_waiting_for_workers_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "WAIT_S", 0.1)
    monkeypatch.setattr(managed_model, "FIRST_DELAY_S", 60.0)
    monkeypatch.setattr(managed_model, "LAST_DELAY_S", 60.0)

    async def body(pool: Pool) -> None:
        worker = await worker_of(pool)
        async with pool.lease("m") as lease:
            await outcomes(lease, [script(die="started")])  # the next restart has a delay
            await lease.ready(patient=True)
            worker = pool.default.worker
            assert worker is not None
            os.kill(worker.pid, signal.SIGSTOP)
            waiting = asyncio.ensure_future(outcomes(lease, ["a", "b"]))
            with_deadline = asyncio.ensure_future(
                text_of(lease, "c", deadline=asyncio.get_running_loop().time() + 0.05)
            )
            while worker.n_open < 3:
                await asyncio.sleep(0)
            os.kill(worker.pid, signal.SIGKILL)
            assert await waiting == {0: "ModelLoading", 1: "ModelLoading"}
            with pytest.raises(errors.ModelLoading):
                await with_deadline

    with scripted():
        drive(body, LOAD)


class DyingModel:
    """Replaces a ManagedModel. Each worker needs a moment to start and dies before it starts a request."""

    def __init__(self) -> None:
        self.patience: list[float] = []

    def add_lease(self, keep_alive_s: float | None) -> int:
        return 0

    async def acquire(self, generation: int, limit: float) -> "DyingModel":
        self.patience.append(limit - asyncio.get_running_loop().time())
        if len(self.patience) == 4:
            raise errors.ModelLoading("loading")
        await asyncio.sleep(0.02)
        return self

    def send(self, bodies: dict[int, wire.Body], queue: EventQueue, **options: Any) -> list[PendingCall]:
        pending = PendingCalls(lambda call: None)
        calls = [pending.begin(index, body, queue) for index, body in bodies.items()]
        pending.fail_all("WorkerDied", "died")
        return calls

    def cancel(self, calls: Iterable[PendingCall]) -> None:
        assert all(call.ended for call in calls)


def test_the_time_limit_covers_all_waits_together() -> None:
    async def body() -> None:
        model = DyingModel()
        lease = Lease(model)  # type: ignore[arg-type]
        assert await outcomes(lease, ["a", "b"]) == {0: "ModelLoading", 1: "ModelLoading"}
        assert all(after < before - 0.015 for before, after in pairwise(model.patience))

    run(body())


# -- before the worker -------------------------------------------------------------------------------


def test_ready_waits_for_the_load_until_its_deadline_unless_patient() -> None:
    load = wire.Load(path="", name="m", engine="", template=script(hang=True))

    async def body(pool: Pool) -> None:
        now = asyncio.get_running_loop().time
        async with pool.lease("m") as lease:
            assert lease.loading
            with pytest.raises(errors.ModelLoading) as caught:
                await lease.ready(now())
            assert caught.value.headers["retry-after"] == "1"
            patient = asyncio.ensure_future(lease.ready(now(), patient=True))
            await asyncio.sleep(0.01)
            assert not patient.done()
            patient.cancel()
            await asyncio.wait({patient})
            found = []
            async with aclosing(lease.run([generate("a"), generate("b")], deadline=now())) as source:
                async for index, event in source:
                    assert isinstance(event, wire.Failed)
                    found.append((index, event.kind, event.retry_after))
            assert found == [(0, "ModelLoading", 1.0), (1, "ModelLoading", 1.0)]

    with scripted():
        drive(body, load)


def test_a_lease_does_not_load_the_model() -> None:
    async def body(pool: Pool) -> None:
        async with pool.lease("m", 0) as lease:
            assert lease.name == "m"
            assert lease.loading
            await asyncio.sleep(0)
        assert not pool.default.loaded

    drive(body, LOAD)


def test_an_unknown_model_is_named() -> None:
    async def body() -> None:
        pool = pool_of()
        with pytest.raises(errors.ModelNotFound, match="'gpt-4'"):
            async with pool.lease("gpt-4"):
                pass

    run(body())
