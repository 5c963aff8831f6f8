"""Web origins: comparing them, and telling those of this machine from others."""

import ipaddress
import re

_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_WEB_ORIGIN = re.compile(r"https?://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::[0-9]{1,5})?")


def normalized(origin: str) -> str:
    """Returns an origin in the form in which equal ones compare equal: as browsers send it, in lower case.

    A slash at the end and a default port are dropped. Schemes such as chrome-extension:// and app:// stay.
    """
    origin = origin.lower()
    if origin.endswith("/") and not origin.endswith("://"):
        origin = origin[:-1]
    scheme, _, rest = origin.partition("://")
    port = _DEFAULT_PORTS.get(scheme)
    return origin[: -len(port)] if port and rest.endswith(port) else origin


def is_loopback_page(origin: str) -> bool:
    """Returns whether an origin is a web page that this machine serves: localhost, 127.0.0.0/8 or [::1]."""
    found = _WEB_ORIGIN.fullmatch(origin.lower())
    return found is not None and is_loopback_name(found["host"].strip("[]"))


def is_loopback_name(name: str) -> bool:
    """Returns whether a host name or an address, in lower case and without brackets, is of this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
