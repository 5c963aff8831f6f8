"""The right to use one model for a while: waits for its load, runs requests on it.

A request that its worker had not started when it died is sent to the next worker.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from tinyoai import errors, wire
from tinyoai.models.managed_model import ManagedModel
from tinyoai.models.pending_calls import ContentSink, EventQueue, PendingCall
from tinyoai.models.registry import Defaults
from tinyoai.models.worker import Worker

WAIT_S = 30.0
"""Seconds that a request waits for a worker in all."""


class Lease:
    """A counted use of a model. While it is open the model is not evicted."""

    def __init__(self, model: ManagedModel, keep_alive_s: float | None = None) -> None:
        self._model = model
        self._generation = model.add_lease(keep_alive_s)

    def close(self) -> None:
        """Ends the use. Call it once."""
        self._model.drop_lease(self._generation)

    @property
    def name(self) -> str:
        """The served id, whatever alias was asked for."""
        return self._model.name

    @property
    def defaults(self) -> Defaults:
        """Values of the fields that a request leaves out."""
        return self._model.model.defaults

    @property
    def loading(self) -> bool:
        """The model cannot answer yet."""
        return not self._model.is_ready(self._generation)

    async def ready(self, deadline: float | None = None, patient: bool = False) -> wire.Ready:
        """Waits for the load and returns its Ready.

        Waits 30 s at most, and not beyond `deadline`, a time of the loop's clock; `patient`: as long as the load
        takes. Raises errors.ModelLoading, ModelFailed, InsufficientMemory or ModelNotFound.
        """
        limit = asyncio.get_running_loop().time() + WAIT_S
        if deadline is not None:
            limit = min(limit, deadline)
        return (await self._model.acquire(self._generation, None if patient else limit)).ready

    async def run(
        self,
        bodies: Sequence[wire.Body],
        *,
        client: str = "",
        group: str = "",
        deadline: float | None = None,
        on_content: ContentSink | None = None,
    ) -> AsyncGenerator[tuple[int, wire.Event], None]:
        """Runs requests, and yields their events with the index of the body, in order of arrival.

        Each body ends in one Done or Failed; no error is raised. Closing the generator cancels what runs.
        `on_content` gets each Content as it arrives, before the queue, and returns false to have it queued; if it
        raises, that request fails with InternalError.
        """
        queue = EventQueue()
        unsent: dict[int, wire.Body] = dict(enumerate(bodies))
        choices: dict[int, list[wire.ChoiceDone]] = {}
        calls: dict[int, PendingCall] = {}
        n_pending = 0
        worker: Worker | None = None
        patience_s = WAIT_S
        clock = asyncio.get_running_loop().time
        try:
            while unsent or n_pending:
                if not n_pending:
                    begin = clock()
                    try:
                        limit = begin + patience_s if deadline is None else deadline
                        worker = await self._model.acquire(self._generation, limit)
                    except errors.ApiError as error:
                        for index in unsent:
                            yield index, _failed(error)
                        return
                    patience_s -= clock() - begin
                    sent = worker.send(
                        unsent, queue, client=client, group=group, deadline=deadline, on_content=on_content
                    )
                    calls = {call.index: call for call in sent}
                    unsent, n_pending = {}, len(calls)
                index, event = await queue.get()
                if isinstance(event, wire.ChoiceDone):
                    choices.setdefault(index, []).append(event)
                elif isinstance(event, wire.Done):
                    n_pending -= 1
                    self._model.note_done(event, choices.get(index, ()))
                elif isinstance(event, wire.Failed):
                    n_pending -= 1
                    if event.kind == "WorkerDied" and not calls[index].started:
                        unsent[index] = bodies[index]
                        continue
                yield index, event
        finally:
            if worker is not None:
                worker.cancel(calls.values())


def _failed(error: errors.ApiError) -> wire.Failed:
    retry_after = error.headers.get("retry-after")
    return wire.Failed(
        id=0,
        kind=type(error).__name__,
        message=error.message,
        code=error.code,
        param=error.param,
        retry_after=None if retry_after is None else float(retry_after),
    )
