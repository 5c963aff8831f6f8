"""GET /metrics: counts, times and the models' states for Prometheus."""

import asyncio
from collections.abc import Callable

from tinyoai import errors, metrics
from tinyoai.host import memory
from tinyoai.models.model_status import ModelStatus, State
from tinyoai.models.pool import Pool
from tinyoai.web.exchange import Exchange

_STATES = tuple(state.value for state in State)


class Metrics:
    """The endpoint. Nothing is counted without the client library."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._counted = metrics.Recorder() if metrics.available() else None
        self.n_in_flight: Callable[[], int] = int
        """Returns the number of requests in progress."""
        self.ended: Callable[[Exchange], None] = lambda exchange: None
        """Counts an exchange that has ended, answered or not."""
        if self._counted is not None:
            self.ended = self._counted.exchange_ended
            pool.on_done = self._counted.observe

    async def __call__(self, exchange: Exchange) -> None:
        """Answers with the page in a format that the scraper accepts. Raises errors.NotFound without the library."""
        if self._counted is None:
            # no 5xx: nothing is broken, this installation has no such page
            raise errors.NotFound(
                f"metrics are not installed: run {metrics.INSTALL} and restart the server",
                code="metrics_not_installed",
            )
        snapshots = [model.status() for model in self._pool.models]
        pids = [snapshot.pid for snapshot in snapshots if snapshot.pid is not None]
        resident = await asyncio.to_thread(_prepare, pids)
        accept = (exchange.head.get(b"accept") or b"").decode("latin-1")
        models = [_model(snapshot, resident) for snapshot in snapshots]
        body, kind = self._counted.page(accept, models, self.n_in_flight())
        exchange.respond(200, body, content_type=kind, headers=[("cache-control", "no-store")])


def _prepare(pids: list[int]) -> dict[int, int]:
    """Imports the library, which blocks the first time, and returns the resident memory of processes."""
    metrics.prepare()
    return {pid: memory.resident(pid) for pid in pids}


def _model(snapshot: ModelStatus, resident: dict[int, int]) -> metrics.ModelSample:
    return metrics.ModelSample(
        name=snapshot.name,
        state=snapshot.state.value,
        states=_STATES,
        memory=resident.get(snapshot.pid) if snapshot.pid is not None else None,
        n_deaths=snapshot.n_deaths,
        n_requests=snapshot.n_leases,
    )
