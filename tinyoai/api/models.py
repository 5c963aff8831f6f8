"""GET /v1/models, /v1/models/{id} and /health: what is served, and how it is.

Owns those answers' wording. It must not know how models are loaded or kept up.
"""

from tinyoai.api import answers, schema
from tinyoai.models.pool import Entry, Pool, State
from tinyoai.web.exchange import Exchange


def _card(entry: Entry) -> schema.Model:
    return schema.Model(id=entry.load.name, created=entry.created)


class Models:
    """The endpoints about models and health."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.draining = False
        """Set when the server is told to stop: it says so to whoever watches its health."""

    async def list(self, exchange: Exchange) -> None:
        """All models."""
        cards = schema.ModelList(data=[_card(entry) for entry in self._pool.entries])
        exchange.respond(200, answers.encode(cards))

    async def one(self, exchange: Exchange) -> None:
        """One model. Raises errors.ModelNotFound."""
        exchange.respond(200, answers.encode(_card(self._pool.find(exchange.route_params["id"]))))

    async def health(self, exchange: Exchange) -> None:
        """200 while requests can be answered; 503 while they cannot."""
        entries = self._pool.entries
        health = schema.Health(
            status="ok",
            models=[schema.ModelHealth(id=e.load.name, state=e.state.value, reason=e.why) for e in entries],
        )
        if self.draining:
            health.status = "draining"
        elif any(entry.state is State.FAILED for entry in entries):
            health.status = "failed"
        elif any(entry.state is not State.READY for entry in entries):
            health.status = "loading"
        exchange.respond(200 if health.status == "ok" else 503, answers.encode(health))
