"""Twelve clients while the worker is killed again and again: no hang, no wrong answer, no unstarted request lost."""

import asyncio
import os
import random
import signal
from collections import Counter
from contextlib import aclosing

from tests.models.workers import FAKE, drive, generate
from tinyoai import wire
from tinyoai.models.model_status import State
from tinyoai.models.pool import Pool

CLIENTS = 12
SECONDS = 8.0


async def answer(pool: Pool, text: str) -> str:
    """Returns the outcome of a request: done, wrong, lost (failed unstarted) or started (died with its worker)."""
    parts: list[str] = []
    started = False
    async with pool.lease("fake") as lease, aclosing(lease.run([generate(text + "\n")])) as source:
        async for _, event in source:
            if isinstance(event, wire.Started):
                started = True
            elif isinstance(event, wire.Content):
                parts.append(event.text)
            elif isinstance(event, wire.Failed):
                return "started" if started and event.kind == "WorkerDied" else f"lost: {event.message}"
    return "done" if "".join(parts) == text else f"wrong: {''.join(parts)!r} for {text!r}"


def test_clients_of_a_worker_that_is_killed_at_random() -> None:
    draw = random.Random(5)
    found: Counter[str] = Counter()
    states: set[State] = set()

    async def body(pool: Pool) -> None:
        model = pool.default
        clock = asyncio.get_running_loop().time
        end = clock() + SECONDS

        async def client(number: int) -> None:
            n = 0
            while clock() < end:
                n += 1
                # longer than any back-off; a hang would fail the test here
                found[await asyncio.wait_for(answer(pool, f"{number}.{n}"), 30)] += 1
                await asyncio.sleep(0.01 * draw.random())

        async def killer() -> None:
            while clock() < end:
                await asyncio.sleep(draw.uniform(0.15, 0.6))
                states.add(model.state)
                if model.worker is not None:
                    os.kill(model.worker.pid, signal.SIGKILL)
                    found["kill"] += 1

        await pool.first_load()
        await asyncio.gather(killer(), *(client(number) for number in range(CLIENTS)))
        assert model.n_deaths >= found["kill"] - 1

    drive(body, wire.Load(path="", name="fake", engine="fake", n_slots=FAKE.n_slots))
    n_kills = found.pop("kill")
    assert n_kills >= 10, found
    assert State.FAILED not in states
    assert set(found) <= {"done", "started"}, found
    assert found["done"] >= 0.9 * found.total(), found
