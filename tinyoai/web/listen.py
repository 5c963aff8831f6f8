"""The listening socket: addresses, binding, and the number of connections that the process can hold."""

import errno
import ipaddress
import resource
import socket
from collections.abc import Sequence
from typing import Any

from tinyoai.errors import UsageError

MAX_CONNECTIONS = 1024
BACKLOG = 1024
"""Clients that may wait to be accepted. Beyond that their kernels try again a second later."""
SPARE_FILES = 64
"""File descriptors kept for everything but clients: workers, logs, the listening socket."""

Address = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]
"""An entry of getaddrinfo's result."""


def addresses(host: str, port: int) -> Sequence[Address]:
    """Returns the addresses of a host name. Raises errors.UsageError if there are none."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host: {host!r} is not an address of this machine: {error}") from None


def listen(host: str, port: int) -> socket.socket:
    """Returns a non-blocking socket that listens on the host's first address. Raises errors.UsageError."""
    family, kind, protocol, _, address = addresses(host, port)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        in_use = error.errno == errno.EADDRINUSE
        advice = "; choose another with --port, or 0 for any free one" if in_use else ""
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror or error}{advice}", exit_code=1
        ) from None
    sock.setblocking(False)
    return sock


def connection_limit() -> int:
    """Returns how many clients can be connected at once. Raises the soft limit of open files if necessary."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, soft - SPARE_FILES)
    return MAX_CONNECTIONS


def is_loopback(host: str) -> bool:
    """Returns whether only programs on this machine can reach a server that listens on this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
