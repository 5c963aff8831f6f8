"""GET /metrics: what was measured, for Prometheus.

Owns who is asked at a scrape, and who tells what between scrapes. It must not know how anything is
counted or worded.
"""

import asyncio
from collections.abc import Callable

from tinyoai import errors, metrics
from tinyoai.host import memory
from tinyoai.models.pool import Entry, Pool, State
from tinyoai.web.exchange import Exchange

_STATES = tuple(state.value for state in State)


class Metrics:
    """The endpoint. Where the client library is not installed nothing is counted."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._counted = metrics.Metrics() if metrics.available() else None
        self.n_in_flight: Callable[[], int] = int
        """Tells how many requests are under way."""
        if self._counted is not None:
            pool.on_done = self._counted.observe

    async def __call__(self, exchange: Exchange) -> None:
        """Everything, in the form the scraper asks for. Raises errors.NotFound without the library.

        That is no 5xx: nothing is broken, this installation has no such page.
        """
        if self._counted is None:
            raise errors.NotFound(
                f"this installation does not measure: {metrics.INSTALL}, and start the server again",
                code="metrics_not_installed",
            )
        entries = self._pool.entries
        pids = [entry.worker.pid for entry in entries if entry.worker is not None]
        resident = await asyncio.to_thread(_look, pids)
        accept = (exchange.head.get(b"accept") or b"").decode("latin-1")
        models = [_model(entry, resident) for entry in entries]
        body, kind = self._counted.page(accept, models, self.n_in_flight())
        exchange.respond(200, body, content_type=kind, headers=[("cache-control", "no-store")])

    def ended(self, exchange: Exchange) -> None:
        """An exchange has ended, answered or left."""
        if self._counted is not None:
            self._counted.request(
                exchange.method,
                exchange.route,
                exchange.status,
                exchange.elapsed_ms / 1000.0,
                exchange.refusal,
            )


def _look(pids: list[int]) -> dict[int, int]:
    """What takes a moment: the library's import, the first time, and the memory of processes."""
    metrics.prepare()
    return {pid: memory.resident(pid) for pid in pids}


def _model(entry: Entry, resident: dict[int, int]) -> metrics.Model:
    return metrics.Model(
        name=entry.model.name,
        state=entry.state.value,
        states=_STATES,
        memory=resident.get(entry.worker.pid) if entry.worker is not None else None,
        n_deaths=entry.n_deaths,
        n_requests=entry.uses,
    )
