"""Who may ask: the checks of a request's head, before its body is asked for.

Owns the list of checks, their order, and what the answer's headers tell of them. It must not know what
routes do, nor models or bodies.
"""

import ipaddress
import time
from collections.abc import Sequence
from typing import Protocol

from tinyoai import errors
from tinyoai.web.api_keys import Keys
from tinyoai.web.rate_limits import Rate, Rates
from tinyoai.web.request_head import Head

_JSON_LIKE = ("application/json", "application/x-www-form-urlencoded", "text/plain")
"""What JSON is sent as: rightly, by curl's default, and by hand."""
_SAFE = ("GET", "HEAD", "OPTIONS")
_WRONG_KEYS = Rate(requests=30)
"""Wrong keys that an address may try in a minute."""
_UNLIMITED = Rate()
_PREFLIGHT_S = 600
_USUAL_HEADERS = "authorization, content-type, x-api-key, x-request-id"
_EXPOSED = (
    "x-request-id, openai-processing-ms, x-queue-ms, retry-after, retry-after-ms, x-should-retry, "
    "x-ratelimit-limit, x-ratelimit-remaining, x-ratelimit-reset, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    "x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)


class Visit(Protocol):
    """What the guard needs of an exchange, and what it writes there."""

    head: Head
    peer: str
    route: str
    client: str
    """Who asks, for fairness and rates: the key's owner, else the address."""
    extra_headers: list[tuple[str, str]]
    n_tokens: int
    """What the answer has cost so far."""


class Guard:
    """All checks, in order."""

    def __init__(
        self,
        *,
        loopback: bool,
        allowed_hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
        keys: Keys | None = None,
        rate: Rate = _UNLIMITED,
        open_routes: Sequence[str] = (),
    ) -> None:
        """`origins`: web origins whose pages may ask, or "*".

        `open_routes`: paths that need no key and count for no rate, with all below them.
        """
        self._loopback = loopback
        self._hosts = {host.lower() for host in allowed_hosts}
        self._origins = {origin.lower().rstrip("/") for origin in origins}
        self._keys = keys or Keys()
        self._rates = Rates(rate, time.monotonic, time.time)
        self._wrong = Rates(_WRONG_KEYS, time.monotonic, time.time)
        self._open = tuple(open_routes)

    def check(self, visit: Visit) -> None:
        """Raises errors.ApiError if this request may not be served."""
        head = visit.head
        visit.client = _network(visit.peer)
        owner = self._keys.owner(head) if self._keys else None
        if owner is not None:
            visit.client = f"key:{owner}"
        self._cross_origin(visit)
        free = head.method == "OPTIONS" or self._is_open(visit.route)
        try:
            self._host(head)
            self._origin(head, keyed=owner is not None)
            if not free:
                self._key(visit, owner)
                self._rates.take(visit.client)
            self._body(head)
        finally:
            self.tell(visit)

    def tell(self, visit: Visit) -> None:
        """Puts how the client stands with its rates on the answer."""
        if self._rates:
            visit.extra_headers += self._rates.headers(visit.client or _network(visit.peer))

    def done(self, visit: Visit) -> None:
        """The exchange has ended: what it cost is charged."""
        self._rates.charge(visit.client, visit.n_tokens)

    def _is_open(self, route: str) -> bool:
        return any(route == known or route.startswith(known + "/") for known in self._open)

    def _host(self, head: Head) -> None:
        """A page that resolves its own name to this address must not reach a local server."""
        host = head.get(b"host")
        if not self._loopback or host is None:
            return
        name = _name(host.decode("ascii"))
        if not (_is_local(name) or name in self._hosts):
            raise errors.Forbidden(
                f"this server listens on a loopback address and is not called {name[:100]!r}; "
                "start it with --allowed-host if that is its name"
            )

    # -- pages from elsewhere --------------------------------------------------------------------

    def _cross_origin(self, visit: Visit) -> None:
        """What a browser wants to read before it lets a page of an allowed origin ask, or see the answer."""
        if not self._origins:
            return
        head, headers = visit.head, visit.extra_headers
        origin = (head.get(b"origin") or b"").decode("latin-1")
        if "*" in self._origins:
            headers.append(("access-control-allow-origin", "*"))
        else:
            headers.append(("vary", "Origin"))
            if not self._allowed(origin):
                return
            headers.append(("access-control-allow-origin", origin))
        headers.append(("access-control-expose-headers", _EXPOSED))
        if head.method == "OPTIONS" and head.get(b"access-control-request-method"):
            asked = (head.get(b"access-control-request-headers") or b"").decode("latin-1")
            headers += [
                ("access-control-allow-methods", "GET, HEAD, POST, DELETE, OPTIONS"),
                ("access-control-allow-headers", asked if asked.isascii() and asked else _USUAL_HEADERS),
                ("access-control-max-age", str(_PREFLIGHT_S)),
            ]
            if head.get(b"access-control-request-private-network"):
                headers.append(("access-control-allow-private-network", "true"))

    def _allowed(self, origin: str) -> bool:
        return "*" in self._origins or origin.lower() in self._origins

    def _origin(self, head: Head, keyed: bool) -> None:
        """A page from elsewhere must not post: browsers send simple requests without asking first.

        One that knows a key was given it, and may.
        """
        if head.method in _SAFE or keyed:
            return
        origin, site = head.get(b"origin"), head.get(b"sec-fetch-site")
        own = (head.get(b"host") or b"").lower()
        foreign = origin is not None and origin.lower() not in (b"http://" + own, b"https://" + own)
        if not (foreign or site == b"cross-site"):
            return
        if origin is not None and self._allowed(origin.decode("latin-1")):
            return
        name = (origin or b"another origin").decode("latin-1")[:100]
        raise errors.Forbidden(
            f"a web page from {name} may not use this server; start it with --cors-origin if it shall"
        )

    # -- keys and rates --------------------------------------------------------------------------

    def _key(self, visit: Visit, owner: str | None) -> None:
        if not self._keys or owner is not None:
            return
        self._wrong.take(visit.client)
        raise errors.Unauthorized(
            "this server needs an API key, and the request carries none that it knows; send it as "
            "'Authorization: Bearer KEY' (the SDKs' api_key) or as 'x-api-key: KEY'"
        )

    def _body(self, head: Head) -> None:
        if head.method in _SAFE:
            return
        coding = (head.get(b"content-encoding") or b"identity").lower()
        if coding != b"identity":
            raise errors.UnsupportedMediaType("compressed bodies are not read here; send it uncompressed")
        kind = (head.get(b"content-type") or b"application/json").partition(b";")[0].strip().lower()
        if kind.decode("latin-1") not in _JSON_LIKE and not kind.endswith(b"+json"):
            raise errors.UnsupportedMediaType("the body must be JSON; send Content-Type: application/json")


def _network(peer: str) -> str:
    """The address; of IPv6 its /64, since one client has all of that."""
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return peer
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return peer


def _name(host: str) -> str:
    """Without the port, and without an IPv6 address's brackets."""
    if host.startswith("["):
        return host[1 : host.index("]")]
    return host.partition(":")[0].lower()


def _is_local(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
