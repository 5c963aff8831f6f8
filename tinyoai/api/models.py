"""GET /v1/models and /v1/models/{id}: what is served.

Owns those answers' wording. It must not know how models are loaded or kept up.
"""

from tinyoai.api import answers, schema
from tinyoai.models.pool import Entry, Pool
from tinyoai.web.exchange import Exchange


def _card(entry: Entry) -> schema.Model:
    return schema.Model(id=entry.load.name, created=entry.created)


class Models:
    """The endpoints about models."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def list(self, exchange: Exchange) -> None:
        """All models."""
        cards = schema.ModelList(data=[_card(entry) for entry in self._pool.entries])
        exchange.respond(200, answers.encode(cards))

    async def one(self, exchange: Exchange) -> None:
        """One model. Raises errors.ModelNotFound."""
        exchange.respond(200, answers.encode(_card(self._pool.find(exchange.route_params["id"]))))
