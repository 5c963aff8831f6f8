"""Requests, pools and loops that the tests of models share."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tinyoai import errors, wire
from tinyoai.models import spawn
from tinyoai.models.catalog import Catalog
from tinyoai.models.model_status import State
from tinyoai.models.pool import Lease, ManagedModel, Pool
from tinyoai.models.registry import Model
from tinyoai.models.worker import Worker
from tinyoai.sampling import Sampling

FAKE = wire.Load(path="", name="fake", engine="fake", n_slots=2)


@contextlib.contextmanager
def scripted() -> Iterator[None]:
    """Makes worker processes run the scripted worker in this block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spawn, "PROGRAM", (str(Path(__file__).with_name("scripted_worker.py")),))
        yield


def script(**fields: Any) -> str:
    """Returns a script as JSON."""
    return msgspec.json.encode(fields).decode()


def generate(text: str, **fields: Any) -> wire.Generate:
    """Returns a Generate with this text as its prompt."""
    prompt: list[wire.Segment] = [wire.Special("bos"), wire.Text(text)]
    return wire.Generate(prompt=prompt, sampling=Sampling(temperature=0), **fields)


class Sink:
    """Takes what `take` returns true for. `reads` has the events between two flushes."""

    def __init__(self, take: Callable[[wire.Event], bool]) -> None:
        self._take = take
        self._arrived: list[wire.Event] = []
        self.reads: list[list[wire.Event]] = []

    @property
    def text(self) -> str:
        """All text that was taken."""
        return "".join(event.text for read in self.reads for event in read if isinstance(event, wire.Content))

    def on_event(self, index: int, event: wire.Event) -> bool:
        """See EventSink."""
        assert index == 0
        taken = self._take(event)
        if taken:
            self._arrived.append(event)
        return taken

    def flush(self) -> None:
        """See EventSink."""
        self.reads.append(self._arrived)
        self._arrived = []


def take_text(event: wire.Event) -> bool:
    """Takes Content alone."""
    return isinstance(event, wire.Content)


def faulty(event: wire.Event) -> bool:
    """Takes nothing, and fails at Content."""
    if isinstance(event, wire.Content):
        raise ZeroDivisionError
    return False


def run(work: Coroutine[Any, Any, None]) -> None:
    """Runs a test in its own event loop."""
    asyncio.run(asyncio.wait_for(work, 60))


def pool_of(load: wire.Load = FAKE, **options: Any) -> Pool:
    """Returns a pool that knows one model without a file."""
    catalog = Catalog(Model(name=load.name, path=""), register=False)
    return Pool(catalog, lambda model: load, timeout=30, **options)


def drive(body: Callable[[Pool], Coroutine[Any, Any, None]], load: wire.Load = FAKE, **options: Any) -> None:
    """Runs a test with such a pool and stops the pool."""

    async def work() -> None:
        pool = pool_of(load, **options)
        try:
            await body(pool)
        finally:
            await pool.stop()

    run(work())


async def text_of(lease: Lease, text: str, **options: Any) -> str:
    """Runs a Generate and returns its text. Raises the errors.ApiError of a failure."""
    parts = []
    async with aclosing(lease.run([generate(text)], **options)) as source:
        async for _, event in source:
            if isinstance(event, wire.Failed):
                raise errors.by_name(event.kind, event.message, param=event.param, code=event.code)
            if isinstance(event, wire.Content):
                parts.append(event.text)
    return "".join(parts)


async def ask(pool: Pool, text: str, name: str = "", keep_alive: float | None = None) -> str:
    """Returns the text of one answer, from a lease of its own."""
    async with pool.lease(name or pool.default.name, keep_alive) as lease:
        return await text_of(lease, text)


async def worker_of(pool: Pool) -> Worker:
    """Returns the default model's worker once it is loaded."""
    await pool.first_load()
    worker = pool.default.worker
    assert worker is not None
    return worker


async def until(model: ManagedModel, state: State) -> None:
    """Waits until the model is in this state."""
    while model.state is not state:
        await model.changed.wait()
