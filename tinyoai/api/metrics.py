"""GET /metrics: measurements for Prometheus."""

import asyncio
from collections.abc import Callable

from tinyoai import errors, metrics
from tinyoai.host import memory
from tinyoai.models.model_status import ModelStatus, State
from tinyoai.models.pool import Pool
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
        statuses = [model.status() for model in self._pool.models]
        pids = [status.pid for status in statuses if status.pid is not None]
        resident = await asyncio.to_thread(_resident, pids)
        accept = (exchange.head.get(b"accept") or b"").decode("latin-1")
        models = [_model(status, resident) for status in statuses]
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


def _resident(pids: list[int]) -> dict[int, int]:
    """Resident bytes by process. Slow parts: the library's first import, and reading /proc."""
    metrics.prepare()
    return {pid: memory.resident(pid) for pid in pids}


def _model(status: ModelStatus, resident: dict[int, int]) -> metrics.Model:
    return metrics.Model(
        name=status.name,
        state=status.state.value,
        states=_STATES,
        memory=resident.get(status.pid) if status.pid is not None else None,
        n_deaths=status.n_deaths,
        n_requests=status.n_leases,
    )
