"""GET /health, /health/live and /health/ready.

Live: the process answers. Ready: it is not being stopped, and some model is loaded or can be loaded on request.
/health is the same as /health/ready.
"""

from collections.abc import Collection
from typing import Literal

from msgspec import Struct

from tinyoai.api import decode
from tinyoai.models.model_status import State
from tinyoai.models.pool import Pool
from tinyoai.web.exchange import Exchange

Status = Literal["ok", "loading", "failed", "draining"]


class Liveness(Struct, kw_only=True):
    """The answer of GET /health/live."""

    status: Literal["ok"] = "ok"


class ModelHealth(Struct, kw_only=True):
    """The state of one model; `reason` says why it is not ready."""

    id: str
    state: str
    reason: str


class Readiness(Struct, kw_only=True):
    """The answer of GET /health and /health/ready."""

    status: Status
    models: list[ModelHealth]


def status(states: Collection[State], *, draining: bool) -> Status:
    """Returns the server's status from the states of its models: one model that can answer is enough."""
    if draining:
        return "draining"
    if State.READY in states or State.UNLOADED in states:
        return "ok"
    if State.LOADING in states or State.WAITING in states:
        return "loading"
    return "failed"


class Health:
    """The endpoints."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.draining = False
        """Set while the server is being stopped."""

    async def live(self, exchange: Exchange) -> None:
        """Answers 200."""
        exchange.respond(200, decode.encode(Liveness()))

    async def ready(self, exchange: Exchange) -> None:
        """Answers 200 while requests can be answered, else 503 with the same body."""
        models = self._pool.models
        body = Readiness(
            status=status({model.state for model in models}, draining=self.draining),
            models=[
                ModelHealth(id=model.name, state=model.state.value, reason=model.reason) for model in models
            ],
        )
        exchange.respond(200 if body.status == "ok" else 503, decode.encode(body))
