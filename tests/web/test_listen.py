"""The listening socket and the limit on connections."""

import errno
import resource
import socket

import pytest

from tinyoai.errors import UsageError
from tinyoai.web import listen


def test_a_free_port_is_listened_on() -> None:
    with listen.listen("127.0.0.1", 0) as sock:
        assert not sock.getblocking()
        with socket.create_connection(sock.getsockname()):
            accepted, _ = sock.accept()
            accepted.close()


def test_the_error_for_a_port_in_use_has_a_remedy() -> None:
    with listen.listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1 port {port}.*choose another with --port") as caught:
            listen.listen("127.0.0.1", port)
        assert caught.value.exit_code == 1


def test_the_advice_depends_on_the_errno_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(socket.socket):
        number = 0

        def bind(self, address: object) -> None:
            raise OSError(self.number, "no")

    monkeypatch.setattr(socket, "socket", Refusing)
    monkeypatch.setattr(errno, "EADDRINUSE", 48)  # as on macOS
    Refusing.number = 48
    with pytest.raises(UsageError, match="choose another"):
        listen.listen("127.0.0.1", 0)
    Refusing.number = errno.EACCES
    with pytest.raises(UsageError) as caught:
        listen.listen("127.0.0.1", 0)
    assert str(caught.value) == "cannot listen on 127.0.0.1 port 0: no"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 300])
def test_a_host_that_is_not_an_address(host: str) -> None:
    with pytest.raises(UsageError, match=r"--host: .* is not an address of this machine"):
        listen.addresses(host, 80)


@pytest.mark.parametrize(
    ("soft", "hard", "raised_to", "limit"),
    [
        (1024, 1 << 20, 1088, 1024),
        (1024, resource.RLIM_INFINITY, 1088, 1024),
        (256, 512, 512, 448),
        (32, 32, 32, 1),
        (4096, 4096, None, 1024),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, 1024),
    ],
)
def test_the_limit_of_connections_depends_on_the_limit_of_files(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised_to: int | None, limit: int
) -> None:
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert listen.connection_limit() == limit
    assert raised == ([] if raised_to is None else [(raised_to, hard)])


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("192.168.1.5", False),
        ("box.example", False),
        ("localhost.example", False),
    ],
)
def test_loopback_hosts(host: str, loopback: bool) -> None:
    assert listen.is_loopback(host) is loopback
