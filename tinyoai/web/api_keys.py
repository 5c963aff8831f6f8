"""API keys: which there are, and whose a request carries.

Owns the key file's form and the comparison, which takes as long for a wrong key as for a right one. It
keeps digests, never the keys, and must not know what a key allows.
"""

import hashlib
import hmac
import stat
from collections.abc import Sequence
from pathlib import Path

from tinyoai.errors import UsageError
from tinyoai.web.request_head import Head


class Keys:
    """Named keys. Without any, everyone is welcome."""

    def __init__(self, named: Sequence[tuple[str, str]] = ()) -> None:
        """Pairs of a key and its owner's name."""
        self._digests = [(_digest(key.encode()), name) for key, name in named]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, head: Head) -> str | None:
        """The name of the key that a request carries, as a bearer token or as x-api-key; None for no good one."""
        found = None
        for given in _given(head):
            digest = _digest(given)
            for known, name in self._digests:  # all of them, always
                if hmac.compare_digest(digest, known):
                    found = name
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _given(head: Head) -> list[bytes]:
    given = []
    scheme, _, token = (head.get(b"authorization") or b"").partition(b" ")
    if scheme.lower() == b"bearer":
        given.append(token.strip())
    other = head.get(b"x-api-key")
    if other is not None:
        given.append(other.strip())
    return [token for token in given if token]


def read(keys: Sequence[str], file: str) -> Keys:
    """Keys of the command line and of a file: a key on each line, and after a blank its owner's name.

    Empty lines and lines that begin with # are skipped. Raises UsageError for a file that cannot be read
    or holds no key, and for a key that no HTTP header can carry.
    """
    named = [(key, f"key {i + 1}") for i, key in enumerate(keys)]
    if file:
        try:
            lines = Path(file).read_text().splitlines()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise UsageError(f"--api-key-file: {file} cannot be read: {reason}", exit_code=1) from None
        found = []
        for i, line in enumerate(lines, 1):
            key, _, name = line.strip().partition(" ")
            if key and not key.startswith("#"):
                found.append((key, name.strip() or f"line {i}"))
        if not found:
            raise UsageError(
                f"--api-key-file: {file} holds no key; write one on each line, or leave the flag out",
                exit_code=1,
            )
        named += found
    for key, name in named:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(
                f"the API key {name!r} is empty or holds what no HTTP header can: use letters and digits"
            )
    return Keys(named)


def exposed(file: str) -> bool:
    """Whether everyone on this machine can read a key file."""
    try:
        return bool(Path(file).stat().st_mode & stat.S_IROTH)
    except OSError:
        return False
