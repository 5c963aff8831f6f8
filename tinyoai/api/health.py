"""GET /health, /health/live and /health/ready: whether this server lives, and whether it can answer.

Owns what those words mean. Live: the process generation. Ready: a request would be taken, so it is not
being stopped and some model is loaded or can be loaded when asked for. /health is /health/ready under
its usual name. It must not know how models are loaded or kept up.
"""

from collections.abc import Collection

from tinyoai.api import generation, schema
from tinyoai.models.pool import Pool, State
from tinyoai.web.exchange import Exchange


def status(states: Collection[State], *, draining: bool) -> schema.Ready:
    """The whole server's state from those of its models: one that can answer is enough."""
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
        """Set when the server is told to stop: it says so to whoever watches."""

    async def live(self, exchange: Exchange) -> None:
        """200 as long as the process answers at all, whatever its models do."""
        exchange.respond(200, generation.encode(schema.Alive()))

    async def ready(self, exchange: Exchange) -> None:
        """200 while requests can be answered; 503, with the same body, while they cannot."""
        models = self._pool.models
        health = schema.Health(
            status=status({model.state for model in models}, draining=self.draining),
            models=[
                schema.ModelHealth(id=model.name, state=model.state.value, reason=model.reason)
                for model in models
            ],
        )
        exchange.respond(200 if health.status == "ok" else 503, generation.encode(health))
