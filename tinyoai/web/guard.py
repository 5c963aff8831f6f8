"""Who may ask: the checks of a request's head, before a byte of its body is kept.

Owns the list of checks and their order. Each is a function of the head alone, and raises or returns,
so keys and rates come as further checks. It must not know routes, models or bodies.
"""

import ipaddress
from collections.abc import Sequence

from tinyoai import errors
from tinyoai.web.gate import Head

_JSON_LIKE = ("application/json", "application/x-www-form-urlencoded", "text/plain")
"""What JSON is sent as: rightly, by curl's default, and by hand."""


class Guard:
    """All checks, in order."""

    def __init__(self, *, loopback: bool, allowed_hosts: Sequence[str] = ()) -> None:
        self._loopback = loopback
        self._hosts = {host.lower() for host in allowed_hosts}

    def check(self, head: Head) -> None:
        """Raises errors.ApiError if this request may not be served."""
        self._host(head)
        self._origin(head)
        self._body(head)

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

    def _origin(self, head: Head) -> None:
        """A page from elsewhere must not post: browsers send simple requests without asking first."""
        if head.method in ("GET", "HEAD", "OPTIONS"):
            return
        origin, site = head.get(b"origin"), head.get(b"sec-fetch-site")
        own = head.get(b"host") or b""
        foreign = origin is not None and origin.lower() not in (
            b"http://" + own.lower(),
            b"https://" + own.lower(),
        )
        if foreign or site == b"cross-site":
            raise errors.Forbidden("a web page from another origin may not use this server")

    def _body(self, head: Head) -> None:
        if head.method in ("GET", "HEAD", "OPTIONS"):
            return
        coding = (head.get(b"content-encoding") or b"identity").lower()
        if coding != b"identity":
            raise errors.UnsupportedMediaType("compressed bodies are not read here; send it uncompressed")
        kind = (head.get(b"content-type") or b"application/json").partition(b";")[0].strip().lower()
        if kind.decode("latin-1") not in _JSON_LIKE and not kind.endswith(b"+json"):
            raise errors.UnsupportedMediaType("the body must be JSON; send Content-Type: application/json")


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
