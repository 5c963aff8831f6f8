"""Listening sockets: addresses of a host name, binding, and how many connections the process can have."""

import errno
import ipaddress
import resource
import socket
from collections.abc import Sequence
from typing import Any

from tinyoai import errors

MAX_CONNECTIONS = 1024
BACKLOG = 1024
"""Connections that may wait to be accepted; clients beyond that retry after a second."""
SPARE_FILES = 64
"""File descriptors kept for workers, logs and the listener."""

Address = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]
"""A result of getaddrinfo."""


def addresses(host: str, port: int) -> Sequence[Address]:
    """The addresses to listen on. Raises errors.UsageError if there are none."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise errors.UsageError(f"--host: {host!r} is not an address of this machine: {error}") from None


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises errors.UsageError naming the address and what to do."""
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
        raise errors.UsageError(
            f"cannot listen on {host} port {port}: {error.strerror or error}{advice}", exit_code=1
        ) from None
    sock.setblocking(False)
    return sock


def max_connections() -> int:
    """The number of connections that the file descriptor limit allows, after raising the limit if possible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, soft - SPARE_FILES)
    return MAX_CONNECTIONS


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
