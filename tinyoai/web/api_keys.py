"""API keys: reading them from the command line and a file, and finding the owner of the one in a request.

Only digests are kept, never the keys. A comparison takes as long for a wrong key as for a right one.
"""

import hashlib
import hmac
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from tinyoai.errors import UsageError
from tinyoai.web.request_head import Head


class Keys:
    """Named keys. False if there are none: then no request needs one."""

    def __init__(self, named: Sequence[tuple[str, str]] = ()) -> None:
        """`named`: pairs of a key and its owner's name."""
        self._digests = [(_digest(key.encode()), name) for key, name in named]
        self._salt = os.urandom(32)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, head: Head) -> str | None:
        """Returns the owner of the key in a request, a bearer token or x-api-key. None if no key is valid."""
        found = self._find(head)
        return found[1] if found is not None else None

    def scope(self, head: Head) -> str:
        """Returns a text that is the key's own and does not tell the key. Empty if no key is valid."""
        found = self._find(head)
        return hmac.new(self._salt, found[0], hashlib.sha256).hexdigest()[:32] if found is not None else ""

    def use_salt(self, salt: bytes) -> None:
        """Sets what `scope` depends on beside the key, so that scopes stay the same after a restart."""
        self._salt = salt

    def _find(self, head: Head) -> tuple[bytes, str] | None:
        """Returns the digest and the owner of the key in a request."""
        found = None
        for given in _sent_keys(head):
            digest = _digest(given)
            for known in self._digests:  # always all of them, so that the time tells nothing
                if hmac.compare_digest(digest, known[0]):
                    found = known
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _sent_keys(head: Head) -> list[bytes]:
    given = []
    scheme, _, token = (head.get(b"authorization") or b"").partition(b" ")
    if scheme.lower() == b"bearer":
        given.append(token.strip())
    other = head.get(b"x-api-key")
    if other is not None:
        given.append(other.strip())
    return [token for token in given if token]


def read(keys: Sequence[str], file: str) -> Keys:
    """Returns the keys of the command line and of a file. Each line is a key, a blank and its owner's name.

    The name is optional. Empty lines and lines that begin with # are skipped. Raises UsageError for a file
    that cannot be read or contains no key, and for a key that no HTTP header can carry.
    """
    named = [(key, f"key {i + 1}") for i, key in enumerate(keys)]
    if file:
        try:
            lines = Path(file).read_text().splitlines()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise UsageError(f"--api-key-file: cannot read {file}: {reason}", exit_code=1) from None
        found = []
        for i, line in enumerate(lines, 1):
            key, _, name = line.strip().partition(" ")
            if key and not key.startswith("#"):
                found.append((key, name.strip() or f"line {i}"))
        if not found:
            raise UsageError(
                f"--api-key-file: {file} contains no key; write one on each line, or omit the flag",
                exit_code=1,
            )
        named += found
    for key, name in named:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(
                f"API key {name!r} is empty or not fit for an HTTP header; use letters and digits"
            )
    return Keys(named)


def exposed(file: str) -> bool:
    """Returns whether everyone on this machine can read a key file."""
    try:
        return bool(Path(file).stat().st_mode & stat.S_IROTH)
    except OSError:
        return False
