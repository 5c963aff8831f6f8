"""Builds the HTTP side of a server: endpoints, routes, access rules and connections.

`app` imports this while the model loads, since the imports take as long as the load of a small model.
"""

import re
from typing import NamedTuple

from tinyoai import errors
from tinyoai.api import routes
from tinyoai.api.adapters import Adapters
from tinyoai.api.docs import Docs
from tinyoai.api.finetune import Finetunes
from tinyoai.api.health import Health
from tinyoai.api.metrics import Metrics
from tinyoai.api.models import Models
from tinyoai.api.openai.chat import Chat
from tinyoai.api.openai.completions import Completions
from tinyoai.api.openai.embeddings import Embeddings
from tinyoai.api.rerank import Rerank
from tinyoai.api.tokenizer import Tokenizer
from tinyoai.config.options import Config
from tinyoai.models.pool import Pool
from tinyoai.web import rate_limits
from tinyoai.web.access import Access
from tinyoai.web.api_keys import Keys
from tinyoai.web.listen import connection_limit, is_loopback
from tinyoai.web.request_head import Limits
from tinyoai.web.server import Server, elapsed_header

PROCESSING_HEADER = "openai-processing-ms"
EXPOSED_HEADERS = (PROCESSING_HEADER, "x-queue-ms", "x-should-retry")
"""Response headers that pages of other origins may read."""
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+/?", re.IGNORECASE)
"""An origin as browsers send it: scheme, host and perhaps a port. Anything else would never match."""


class Api(NamedTuple):
    """The parts that `app` starts, watches and stops."""

    server: Server
    finetunes: Finetunes
    health: Health


def build(pool: Pool, config: Config, keys: Keys) -> Api:
    """Returns the HTTP side of a server. Raises errors.UsageError for a wrong origin or rate limit."""
    access = build_access(config, keys)
    finetunes = Finetunes(pool, config.home, config.chat_template)
    health, metrics = Health(pool), Metrics(pool)
    router = routes.router(
        routes.Endpoints(
            chat=Chat(pool),
            completions=Completions(pool),
            embeddings=Embeddings(pool),
            rerank=Rerank(pool),
            tokenizer=Tokenizer(pool),
            models=Models(pool),
            adapters=Adapters(pool),
            finetunes=finetunes,
            health=health,
            metrics=metrics,
            docs=Docs(lambda: pool.default.name),
        )
    )
    limits = Limits(body_bytes=config.max_body, connections=connection_limit())
    server = Server(router, access, limits, metrics.ended, elapsed_header(PROCESSING_HEADER))
    metrics.n_in_flight = lambda: server.n_busy
    return Api(server, finetunes, health)


def build_access(config: Config, keys: Keys) -> Access:
    """Returns the access rules. Raises errors.UsageError for a wrong origin or rate limit."""
    for origin in config.cors_origin:
        if not ORIGIN.fullmatch(origin):
            raise errors.UsageError(
                f"--cors-origin: {origin!r} is not an origin; give scheme and host, such as "
                "https://app.example or chrome-extension://ID, or * for any"
            )
    return Access(
        loopback=is_loopback(config.host),
        allowed_hosts=config.allowed_host,
        origins=config.cors_origin,
        keys=keys,
        rate=rate_limits.parse(config.rate_limit),
        open_routes=sorted(routes.PUBLIC),
        expose_headers=EXPOSED_HEADERS,
        shared_prefixes=config.cache_shared,
    )
