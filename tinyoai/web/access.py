"""Access checks of a request's head, in a fixed order, before its body is read.

They are: the Host header, the page's origin, the API key, the rate limit, and the body's media type.
"""

import functools
import ipaddress
import time
from collections.abc import Sequence

from tinyoai import errors
from tinyoai.web.api_keys import Keys
from tinyoai.web.exchange import Exchange
from tinyoai.web.origins import is_loopback_name, is_loopback_page, normalized
from tinyoai.web.rate_limits import Rate, Rates
from tinyoai.web.request_head import Head

_JSON_LIKE = ("application/json", "application/x-www-form-urlencoded", "text/plain")
"""Media types that clients send JSON as: the right one, curl's default, and the one of hand-written clients."""
_SAFE = ("GET", "HEAD", "OPTIONS")
_WRONG_KEYS = Rate(requests=30)
"""Wrong keys that an address may try in a minute."""
_UNLIMITED = Rate()
_PREFLIGHT_S = 600
_METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
_USUAL_HEADERS = "authorization, content-type, x-api-key, x-request-id"
_EXPOSED = (
    "x-request-id",
    "retry-after",
    "retry-after-ms",
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
)


class Access:
    """All checks, and the rate limits that they need."""

    def __init__(
        self,
        *,
        loopback: bool,
        allowed_hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
        keys: Keys | None = None,
        rate: Rate = _UNLIMITED,
        open_routes: Sequence[str] = (),
        expose_headers: Sequence[str] = (),
        shared_prefixes: bool = False,
    ) -> None:
        """`loopback`: the server listens on a loopback address.

        `origins`: web origins whose pages may use the server, or "*".
        `open_routes`: paths, with all below them, that need no key and count for no rate limit.
        `expose_headers`: response headers that allowed pages may read, beside those of this package.
        `shared_prefixes`: clients with different keys reuse each other's prompts.
        """
        self._loopback = loopback
        self._hosts = {host.lower() for host in allowed_hosts}
        self._origins = {normalized(origin) for origin in origins}
        self._keys = keys or Keys()
        self._rates = Rates(rate, time.monotonic, time.time)
        self._wrong_keys = Rates(_WRONG_KEYS, time.monotonic, time.time)
        self._open = tuple(open_routes)
        self._shared_prefixes = shared_prefixes
        self._exposed = ", ".join((*_EXPOSED, *expose_headers))

    def check(self, exchange: Exchange) -> None:
        """Sets client and scope, and adds headers to the response. Raises errors.ApiError to refuse the request."""
        head = exchange.head
        exchange.client = _network(exchange.peer)
        owner = self._keys.owner(head) if self._keys else None
        if owner is not None:
            exchange.client = f"key:{owner}"
            exchange.scope = "" if self._shared_prefixes else self._keys.scope(head)
        self._add_cors_headers(exchange)
        free = head.method == "OPTIONS" or self._is_open(exchange.route)
        try:
            self._check_host(head)
            self._check_origin(exchange, keyed=owner is not None)
            if not free:
                self._check_key(exchange, owner)
                self._rates.take(exchange.client)
            _check_media_type(head)
        finally:
            self.add_rate_headers(exchange)

    def add_rate_headers(self, exchange: Exchange) -> None:
        """Adds the client's rate limits to the response."""
        if self._rates:
            exchange.extra_headers += self._rates.headers(exchange.client or _network(exchange.peer))

    def on_request_finished(self, exchange: Exchange) -> None:
        """Charges the client for the tokens of the response."""
        self._rates.charge(exchange.client, exchange.n_tokens)

    def _is_open(self, route: str) -> bool:
        return any(route == known or route.startswith(known + "/") for known in self._open)

    def _check_host(self, head: Head) -> None:
        """Refuses DNS rebinding: a page whose own name resolves to this address must not reach a local server."""
        host = head.get(b"host")
        if not self._loopback or host is None:
            return
        name = _host_name(host.decode("ascii"))
        if not (is_loopback_name(name) or name in self._hosts):
            raise errors.Forbidden(
                f"host {name[:100]!r} is not allowed on a loopback address; "
                f"add --allowed-host {name[:100]} to allow it"
            )

    # -- web pages -------------------------------------------------------------------------------

    def _add_cors_headers(self, exchange: Exchange) -> None:
        """Adds the headers without which a browser lets no page of an allowed origin use the response."""
        local_pages = self._loopback and exchange.local_pages
        if not (self._origins or local_pages):
            return
        head, headers = exchange.head, exchange.extra_headers
        origin = (head.get(b"origin") or b"").decode("latin-1")
        if "*" in self._origins:
            headers.append(("access-control-allow-origin", "*"))
        else:
            headers.append(("vary", "Origin"))
            if not self._is_allowed(origin, exchange):
                return
            headers.append(("access-control-allow-origin", origin))
        headers.append(("access-control-expose-headers", self._exposed))
        asked = head.get(b"access-control-request-method")
        if head.method == "OPTIONS" and asked:
            wanted = (head.get(b"access-control-request-headers") or b"").decode("latin-1")
            # browsers remember each of these methods for the path, and local pages may not use them all
            methods = _METHODS if self._is_configured(origin) else asked.decode("latin-1")
            headers += [
                ("access-control-allow-methods", methods),
                ("access-control-allow-headers", wanted if wanted.isascii() and wanted else _USUAL_HEADERS),
                ("access-control-max-age", str(_PREFLIGHT_S)),
            ]
            if head.get(b"access-control-request-private-network"):
                headers.append(("access-control-allow-private-network", "true"))

    def _is_allowed(self, origin: str, exchange: Exchange) -> bool:
        """Returns whether pages of a foreign origin may use this route."""
        if self._is_configured(origin):
            return True
        return self._loopback and exchange.local_pages and is_loopback_page(origin)

    def _is_configured(self, origin: str) -> bool:
        return "*" in self._origins or normalized(origin) in self._origins

    def _check_origin(self, exchange: Exchange, keyed: bool) -> None:
        """Refuses writes by pages of foreign origins: browsers send simple requests without a preflight.

        A page that knows a key has been given it on purpose, and may write.
        """
        head = exchange.head
        if head.method in _SAFE or keyed:
            return
        origin, site = head.get(b"origin"), head.get(b"sec-fetch-site")
        own = (head.get(b"host") or b"").lower()
        foreign = origin is not None and origin.lower() not in (b"http://" + own, b"https://" + own)
        if not (foreign or site == b"cross-site"):
            return
        if origin is None:
            raise errors.Forbidden("cross-site requests without an Origin header are not allowed")
        name = origin.decode("latin-1")
        if not self._is_allowed(name, exchange):
            name = name[:100]
            raise errors.Forbidden(
                f"requests from origin {name} are not allowed; add --cors-origin {name} to allow them"
            )

    # -- keys ------------------------------------------------------------------------------------

    def _check_key(self, exchange: Exchange, owner: str | None) -> None:
        if not self._keys or owner is not None:
            return
        self._wrong_keys.take(exchange.client)
        raise errors.Unauthorized(
            "this server requires an API key, and the request has no valid one; send it as "
            "'Authorization: Bearer KEY' (the SDKs' api_key) or as 'x-api-key: KEY'"
        )


def _check_media_type(head: Head) -> None:
    if head.method in _SAFE:
        return
    coding = (head.get(b"content-encoding") or b"identity").lower()
    if coding != b"identity":
        raise errors.UnsupportedMediaType("compressed bodies are not supported; send the body uncompressed")
    kind = (head.get(b"content-type") or b"application/json").partition(b";")[0].strip().lower()
    if kind.decode("latin-1") not in _JSON_LIKE and not kind.endswith(b"+json"):
        raise errors.UnsupportedMediaType("the body must be JSON; send Content-Type: application/json")


@functools.lru_cache(maxsize=1024)
def _network(peer: str) -> str:
    """Returns the address, or the /64 network of an IPv6 address, since one client has all of that."""
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return peer
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return peer


def _host_name(host: str) -> str:
    """Returns a Host header in lower case, without the port and without an IPv6 address's brackets."""
    if host.startswith("["):
        return host[1 : host.index("]")]
    return host.partition(":")[0].lower()
