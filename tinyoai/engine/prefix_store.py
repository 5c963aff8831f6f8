"""The prefix store: states of finished sequences in host memory, and the index of those on disk.

A state is found by the token ids that it was computed from, which are compared in full. States of different scopes or
adapters never meet. Not thread-safe: the scheduler's loop owns it.
"""

import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from tinyoai.engine.contract import Adapter

MIN_TOKENS = 64
"""A shorter sequence is not worth keeping."""
CHECKPOINTS = 3
"""States of one conversation that are kept, where one serves whole or not at all."""


class Entry:
    """A saved sequence. Its state is in memory, on disk, or both."""

    __slots__ = ("adapters", "conversation", "file", "scope", "state", "tokens", "used_at")

    def __init__(
        self,
        scope: str,
        adapters: tuple[Adapter, ...],
        tokens: "array[int]",
        *,
        used_at: float,
        state: bytes | None = None,
        file: Path | None = None,
        conversation: int = 0,
    ) -> None:
        self.scope = scope
        self.adapters = adapters
        self.tokens = tokens
        self.used_at = used_at
        """Seconds since 1970."""
        self.state = state
        self.file = file
        self.conversation = conversation
        """As in Slot."""

    def starts(self, other: "Entry") -> bool:
        """Its tokens are the first ones of another entry of the same scope and adapters, or all of them."""
        n = len(self.tokens)
        return (
            0 < n <= len(other.tokens)
            and self.scope == other.scope
            and self.adapters == other.adapters
            and other.tokens[n - 1] == self.tokens[-1]  # tells most of them apart at once
            and other.tokens[:n] == self.tokens
        )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of leading tokens that are equal; O(length), by halves compared in C. Both are of one type."""
    low, high = 0, min(len(a), len(b))
    if not high or a[0] != b[0]:
        return 0
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


class PrefixStore:
    """Entries by scope, adapters and token ids. The states in memory take at most `limit` bytes."""

    def __init__(self, limit: int, *, goes_back: bool = True, now: Callable[[], float] = time.time) -> None:
        """`goes_back`: a loaded state can be truncated, so that a long one serves for a short one."""
        self.entries: list[Entry] = []
        self._limit = limit
        self._goes_back = goes_back
        self._now = now
        self._used = 0
        self._per_token = 0.0
        """Bytes of a token in the last state."""

    @property
    def used(self) -> int:
        """Bytes of the states in memory."""
        return self._used

    @property
    def in_memory(self) -> bool:
        """States can be kept in memory."""
        return self._limit > 0

    def find(
        self, prompt: Sequence[int], scope: str, adapters: tuple[Adapter, ...], at_most: int
    ) -> tuple[Entry | None, int, int]:
        """The entry with the longest prefix of a prompt, its usable length, and the longest length seen.

        At most `at_most` tokens are usable; without `goes_back` only whole entries are.
        """
        wanted = array("i", prompt)
        best, n_best, n_seen = None, 0, 0
        for entry in self.entries:
            if entry.scope != scope or entry.adapters != adapters:
                continue
            n = common_prefix(entry.tokens, wanted)
            n_seen = max(n_seen, n)
            if not self._goes_back and not n == len(entry.tokens) <= at_most:
                continue
            n = min(n, at_most)
            # of equal ones a state in memory is loaded sooner, and a short one sooner than a long one
            if n > n_best or (
                best is not None
                and n == n_best
                and (entry.state is None, len(entry.tokens)) < (best.state is None, len(best.tokens))
            ):
                best, n_best = entry, n
        return best, n_best, n_seen

    def wants(self, tokens: Sequence[int], scope: str, adapters: tuple[Adapter, ...]) -> bool:
        """Whether `put` would keep the state of a sequence; if an entry has it already, that counts as used."""
        n = len(tokens)
        if n < MIN_TOKENS or n * self._per_token * self._goes_back > self._limit or not self._limit:
            return False
        probe = Entry(scope, adapters, array("i", tokens), used_at=self._now())
        for entry in self.entries:
            if entry.state is not None and self.covers(entry, probe):
                entry.used_at = probe.used_at
                return False
        return True

    def covers(self, entry: Entry, other: Entry) -> bool:
        """A state of `entry` serves wherever one of `other` does."""
        return other.starts(entry) and (self._goes_back or len(other.tokens) == len(entry.tokens))

    def put(
        self,
        tokens: Sequence[int],
        scope: str,
        adapters: tuple[Adapter, ...],
        state: bytes,
        conversation: int = 0,
    ) -> Entry | None:
        """Keeps a state in memory, and drops what it makes superfluous; None: it is larger than the limit."""
        self._per_token = len(state) / len(tokens)
        if len(state) > self._limit:
            return None
        entry = Entry(
            scope,
            adapters,
            array("i", tokens),
            used_at=self._now(),
            state=state,
            conversation=conversation,
        )
        known = next((e for e in self.entries if e.starts(entry) and len(e.tokens) == len(tokens)), None)
        if known is not None:  # the same tokens on disk, or an older state of them
            entry.file = known.file
            self.remove(known)
        self.entries.append(entry)
        self._used += len(state)
        for other in self.superseded(entry):
            self.forget(other)
        for oldest in sorted(self.entries, key=lambda e: e.used_at):
            if self._used <= self._limit:
                break
            if oldest is not entry:
                self.forget(oldest)
        return entry

    def superseded(self, entry: Entry) -> list[Entry]:
        """The entries of the same conversation that are not worth keeping beside `entry`."""
        others = [e for e in self.entries if e is not entry]
        if self._goes_back:
            return [e for e in others if e.starts(entry)]
        known = entry.conversation
        earlier = [e for e in others if (known and e.conversation == known) or e.starts(entry)]
        earlier.sort(key=lambda e: e.used_at)
        return earlier[: max(0, len(earlier) - (CHECKPOINTS - 1))]

    def add_file(self, entry: Entry) -> None:
        """Adds an entry whose state is on disk alone."""
        self.entries.append(entry)

    def touch(self, entry: Entry) -> None:
        """Records that an entry was used."""
        entry.used_at = self._now()

    def forget(self, entry: Entry) -> None:
        """Drops a state from memory; an entry without a file is gone."""
        if entry.state is not None:
            self._used -= len(entry.state)
            entry.state = None
        if entry.file is None:
            self.remove(entry)

    def remove(self, entry: Entry) -> None:
        """Drops an entry, but not its file."""
        if entry.state is not None:
            self._used -= len(entry.state)
            entry.state = None
        if entry in self.entries:
            self.entries.remove(entry)
