"""API keys: the key file, and the owner of a key."""

import os
from pathlib import Path

import pytest

from tinyoai.errors import UsageError
from tinyoai.web import api_keys
from tinyoai.web.request_head import Head, Limits, read_head


def request(key: bytes) -> Head:
    """Returns a request that carries a key."""
    head = read_head(b"GET / HTTP/1.1\r\nHost: a\r\nx-api-key: " + key + b"\r\n\r\n", Limits())
    assert head is not None
    return head


def test_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# comment\n\nsk-a Ann's laptop\n  sk-b\n")
    read = api_keys.read(["sk-c"], str(path))
    owners = {key: read.owner(request(key)) for key in (b"sk-a", b"sk-b", b"sk-c", b"sk-d")}
    assert owners == {b"sk-a": "Ann's laptop", b"sk-b": "line 4", b"sk-c": "key 1", b"sk-d": None}


@pytest.mark.parametrize("content", [b"", b"# only a comment\n", b"\xff\xfe", "schl\u00fcssel\n".encode()])
def test_a_key_file_that_would_let_everyone_in_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        api_keys.read([], str(path))
    with pytest.raises(UsageError, match="nothing-here"):
        api_keys.read([], str(tmp_path / "nothing-here"))


@pytest.mark.parametrize("key", ["", "a b", "schl\u00fcssel", "a\nb"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="'key 2' is empty or not fit"):
        api_keys.read(["good", key], "")


@pytest.mark.parametrize(("mode", "exposed"), [(0o600, False), (0o640, False), (0o644, True)])
def test_a_key_file_that_others_can_read(tmp_path: Path, mode: int, exposed: bool) -> None:
    path = tmp_path / "keys"
    path.write_text("sk-a\n")
    os.chmod(path, mode)
    assert api_keys.exposed(str(path)) is exposed
    assert not api_keys.exposed(str(tmp_path / "nothing-here"))
