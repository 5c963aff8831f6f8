"""Many calls at once through a lease: in order, sent again only if nothing was accepted, cancelled together."""

import asyncio
import os
import signal
from contextlib import aclosing

from tests.models.test_worker import fake_pool, run, said
from tinyoai import wire
from tinyoai.models.pool import Lease, Pool
from tinyoai.models.worker import Make, Worker


def embed(text: str) -> Make:
    """An Embed in the making."""
    prompt: list[wire.Segment] = [wire.Special("bos"), wire.Text(text)]
    return lambda call_id: wire.Embed(id=call_id, prompt=prompt, group="one request")


def count(text: str) -> Make:
    """A Tokenize in the making."""
    return lambda call_id: wire.Tokenize(id=call_id, prompt=[wire.Text(text)])


async def gathered(lease: Lease, makes: list[Make]) -> list[tuple[int, str]]:
    """Every event's call and kind, in the order in which they came."""
    async with aclosing(lease.calls(makes)) as source:
        return [(index, type(event).__name__) async for index, event in source]


GOOD = ["Accepted", "Vector", "Done"]


async def worker_of(pool: Pool) -> Worker:
    """The one that runs."""
    await pool.first_load()
    worker = pool.find("fake").worker
    assert worker is not None
    return worker


def test_answers_come_in_the_order_of_the_questions() -> None:
    async def drive() -> None:
        pool = fake_pool()
        async with pool.lease("fake") as lease:
            found = await gathered(lease, [embed("x" * (50 - n)) for n in range(50)])
            assert found == [(n, kind) for n in range(50) for kind in GOOD]
            assert await gathered(lease, [count("a"), embed("b")]) == [
                (0, "Tokens"),
                *((1, kind) for kind in GOOD),
            ]
            assert await gathered(lease, []) == []
        await pool.stop()

    run(drive())


def test_all_are_sent_once_more_if_none_was_accepted() -> None:
    async def drive() -> None:
        pool = fake_pool()
        worker = await worker_of(pool)
        os.kill(worker.pid, signal.SIGSTOP)  # it reads nothing more
        async with pool.lease("fake") as lease:
            waiting = asyncio.ensure_future(gathered(lease, [embed("a"), embed("b")]))
            while worker.n_open < 2:
                await asyncio.sleep(0)
            os.kill(worker.pid, signal.SIGKILL)
            assert await waiting == [(n, kind) for n in range(2) for kind in GOOD]
        await pool.stop()

    run(drive())


def test_none_is_sent_again_once_one_was_accepted() -> None:
    async def drive() -> None:
        pool = fake_pool()
        async with pool.lease("fake") as lease:
            found = await gathered(lease, [embed('!{"kill_at": 0}\n'), *[embed("x" * 100)] * 9])
            kinds = dict(found)
            assert kinds[0] == "Failed"
            assert len(kinds) == 10
        assert await said(pool, "the next one") == "the next one"
        await pool.stop()

    run(drive())


def test_a_worker_that_nobody_watches_any_more_does_not_hold_up_the_end() -> None:
    async def drive() -> None:
        pool = fake_pool()
        worker = await worker_of(pool)
        for task in worker._tasks:  # as a loop does that is closed without a stop
            task.cancel()
        await pool.stop()
        assert await worker.ended == "was left behind"
        await worker._process.wait()
        worker._process._transport.close()  # type: ignore[attr-defined]
        await asyncio.sleep(0.01)

    run(drive())


def test_closing_cancels_all() -> None:
    async def drive() -> None:
        pool = fake_pool()
        worker = await worker_of(pool)
        slow = '!{"step_ms": 20}\n' + "x" * 3000
        async with pool.lease("fake") as lease:
            async with aclosing(lease.calls([embed(slow)] * 200)) as source:
                index, event = await anext(source)
                assert (index, type(event)) == (0, wire.Accepted)
                assert worker.n_open == 200
            assert worker.n_open == 0
            # both slots would be busy for minutes
            assert await said(pool, "after") == "after"
        await pool.stop()

    run(drive())
