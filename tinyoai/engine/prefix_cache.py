"""The prefix cache: finds what of a prompt is computed already, and brings it into a slot.

A finished sequence stays in its slot. When another conversation takes the slot, its state moves to the prefix store in
host memory, from there to disk while the worker is idle, and back when its conversation goes on.
"""

import itertools
import sys
import time
from collections.abc import Callable

from tinyoai.engine.contract import Engine, Truncates
from tinyoai.engine.disk_cache import DiskCache
from tinyoai.engine.prefix_reuse import Assignment, choose, packed
from tinyoai.engine.prefix_store import MIN_TOKENS, Entry, PrefixStore, common_prefix
from tinyoai.engine.sequences import Sequences
from tinyoai.engine.slots import Slot
from tinyoai.engine.tasks import Task
from tinyoai.host import subproc

MIN_GAIN = 16
"""Tokens that a state in memory must bring over the slots' sequences."""
MIN_GAIN_ON_DISK = 64
"""The same of a state on disk."""
MOVED = 20
"""Idle tokens that are moved to memory for each token of a prompt, at most: computing one takes far longer."""

_conversations = itertools.count(1)


class PrefixCache:
    """Places prompts into slots. `store` and `disk` may be missing: then finished sequences stay in slots alone."""

    def __init__(
        self,
        engine: Engine,
        sequences: Sequences,
        store: PrefixStore | None = None,
        disk: DiskCache | None = None,
    ) -> None:
        self._engine = engine
        self._caps = engine.caps
        self._sequences = sequences
        self._slots = sequences.slots
        self._store = store if engine.caps.saves else None
        self._disk = disk if self._store is not None else None
        caps = engine.caps
        self._packs = (
            caps.batches and not caps.shares_cells and caps.truncates is Truncates.FREELY and caps.cuts_saved
        )
        """Streams of KV cells that are neighbours are evaluated together, and any can be copied to any."""
        self._unsaved = False
        """Something may have changed since everything was on disk."""
        self._said = False
        """The user knows that --cache-ram is too small for a conversation."""
        sequences.on_evict = self._leave

    # -- requests ----------------------------------------------------------------------------------

    def assign(self, task: Task, scope: str) -> Assignment | None:
        """The slot for a task, and where its prefix comes from; None: all slots are busy."""
        found = self._choose(task, scope)
        return packed(found, self._slots) if found is not None and self._packs else found

    def _choose(self, task: Task, scope: str) -> Assignment | None:
        found = choose(
            self._slots,
            task.ids,
            self._caps,
            n_reusable=task.n_reusable,
            adapters=task.adapters,
            scope=scope,
            exact=self._engine.exact_prefix if task.exact else None,
        )
        if found is None or self._store is None:
            return found
        if self._disk is not None:
            self._disk.index(self._store)
        most = min(task.n_reusable, len(task.ids) - 1)
        entry, n, _ = self._store.find(task.ids, scope, task.adapters, most)
        if entry is None:
            return found
        gain = MIN_GAIN if entry.state is not None else MIN_GAIN_ON_DISK
        # without a way back every step forward counts
        if n - found.n_keep < (gain if self._caps.truncates is not Truncates.NEVER else 1):
            return found
        return Assignment(self._target(task.ids[:n]), n, entry=entry)

    def _target(self, prefix: list[int]) -> Slot:
        """The free slot that loses nothing by taking this prefix, else the least recently used one."""

        def loss(slot: Slot) -> tuple[bool, int]:
            kept = slot.tokens == prefix[: len(slot.tokens)]
            return not kept, slot.last_used

        return min((slot for slot in self._slots if not slot.busy), key=loss)

    def seen(self, task: Task, scope: str) -> int:
        """The prompt token at which the best sequence of slots and store differs; -1: none shares a token."""
        n = 0
        for slot in self._slots:
            if slot.scope == scope and slot.adapters == task.adapters:
                n = max(n, common_prefix(slot.tokens, task.ids))
        if self._store is not None:
            n = max(n, self._store.find(task.ids, scope, task.adapters, 0)[2])
        return n or -1

    def place(self, found: Assignment, task: Task, scope: str) -> tuple[Slot, int]:
        """Carries out an assignment. Returns the slot, and how many prompt tokens it has then.

        If the file of an entry is not what was written, the entry is gone and the next best assignment is taken.
        """
        state = None
        while found.entry is not None and (state := self._state(found.entry)) is None:
            found = self.assign(task, scope) or Assignment(found.slot, 0)
        slot, n_keep, source, entry = found
        stays = common_prefix(slot.tokens, task.ids[:n_keep])
        if len(slot.tokens) - stays >= MIN_TOKENS or self._caps.truncates is Truncates.NEVER:
            self._leave(slot, stays)
        held = source or slot
        if n_keep < max(1, held.n_resumable):  # a few common tokens do not make it the same conversation
            slot.conversation = next(_conversations)
        else:
            slot.conversation = held.conversation
        if entry is not None and state is not None:
            entry.conversation = slot.conversation = entry.conversation or next(_conversations)
            n_keep = self._restore(slot, entry, state, n_keep)
            if n_keep and task.exact:
                n_keep = self._engine.exact_prefix(slot.index, n_keep, len(task.ids))
        elif source is not None:
            self._sequences.copy(source, slot, n_keep)
        n_keep = self._sequences.cut(slot, n_keep)
        slot.adapters, slot.scope, slot.n_resumable = task.adapters, scope, task.n_resumable
        self._unsaved = True
        if self._caps.shares_cells and self._store is not None and self._store.in_memory:
            self._make_way(slot, len(task.ids) - n_keep)
        return slot, n_keep

    def _make_way(self, slot: Slot, n: int) -> None:
        """Moves idle sequences out of the cells that n tokens of a prompt are computed beside.

        They would get the cells between those of others, which makes their attention slower.
        """
        n = MOVED * n if n >= MIN_TOKENS else 0
        idle = [each for each in self._slots if each.tokens and not each.busy and each is not slot]
        for each in sorted(idle, key=lambda each: each.last_used):
            n -= len(each.tokens)
            if n < 0:
                break
            self._sequences.evict(each)

    def _state(self, entry: Entry) -> bytes | None:
        """The state of an entry; None, and the entry is gone, if its file is not what was written."""
        if entry.state is not None or self._store is None:
            return entry.state
        state = self._disk.read(entry) if self._disk is not None else None
        if state is None:
            self._store.remove(entry)
        return state

    def _restore(self, slot: Slot, entry: Entry, state: bytes, n: int) -> int:
        """Loads an entry into a slot; returns n, or 0 if it does not fit."""
        assert self._store is not None
        sequences = self._sequences
        sequences.cut(slot, 0)
        if not sequences.free(len(entry.tokens)):
            return 0
        if not sequences.load(slot, entry.tokens.tolist(), state):
            if self._disk is not None:
                self._disk.remove(entry)
            self._store.remove(entry)
            return 0
        self._store.touch(entry)
        return n

    def keep(self, slot: Slot) -> None:
        """Saves a slot's sequence into the store, if it is worth it. The slot stays as it is."""
        store = self._store
        if store is None or not slot.last_used or not store.wants(slot.tokens, slot.scope, slot.adapters):
            return
        state = self._sequences.save(slot)
        entry = store.put(slot.tokens, slot.scope, slot.adapters, state, slot.conversation)
        if entry is None and not self._said:
            self._said = True
            print(
                f"{subproc.WARNING}a conversation of {len(slot.tokens)} tokens takes {len(state) / 1e6:.0f} MB, more "
                "than all of --cache-ram; such long ones stay in slots and on disk only",
                file=sys.stderr,
                flush=True,
            )
        self._unsaved = True

    def _leave(self, slot: Slot, stays: int = 0) -> None:
        """Saves a slot's sequence before all but `stays` tokens are dropped.

        Where a saved state serves as a whole only, but the sequence can be cut, the state at the last message is saved
        too: it serves for another answer to that message.
        """
        self.keep(slot)
        if self._resumes_behind(slot) and stays < slot.n_resumable:
            self._sequences.cut(slot, slot.n_resumable)
            self.keep(slot)

    def _resumes_behind(self, slot: Slot) -> bool:
        caps, n = self._caps, slot.n_resumable
        sliding = caps.truncates is not Truncates.NEVER and not caps.cuts_saved
        return sliding and slot.n_whole <= n < len(slot.tokens)

    def on_tokens(self, slot: Slot, task: Task) -> None:
        """Saves a sequence where its prompt is to be resumed, if it cannot be cut there later."""
        if len(slot.tokens) == task.checkpoint:
            self.keep(slot)

    def on_release(self, slot: Slot, task: Task) -> None:
        """A task has left its slot."""
        slot.used_at = time.time()
        self._unsaved = True
        if not task.keeps_prefix:
            slot.last_used = 0  # the next prompt takes this slot before any conversation's

    # -- disk --------------------------------------------------------------------------------------

    def compute_key(self) -> bool:
        """Computes a part of what the files on disk are named by; False: nothing is left to do."""
        return self._disk is not None and self._disk.compute_key()

    @property
    def on_disk(self) -> bool:
        """Sequences are kept on disk."""
        return self._disk is not None

    @property
    def unsaved(self) -> bool:
        """There may be sequences to write to disk."""
        return self._disk is not None and self._unsaved

    def save_all(self, go_on: Callable[[], bool], *, last: bool = False) -> bool:
        """Writes all sequences that are not on disk, the most recently used first; False: `go_on` ended it.

        `last`: the slots are not needed any more.
        """
        store, disk = self._store, self._disk
        if store is None or disk is None:
            return True
        if not disk.known:
            self._unsaved = False  # the model's file has changed: nothing can be written until the next load
            return True
        disk.index(store)
        for entry, slot in self._unsaved_entries(store, last=last):
            if any(known.file is not None and store.covers(known, entry) for known in store.entries):
                continue
            if not go_on():
                return False
            state = entry.state
            if slot is not None:
                if len(entry.tokens) < len(slot.tokens):
                    self._sequences.cut(slot, len(entry.tokens))
                state = self._sequences.save(slot)
            if state is None or not disk.write(entry, state, go_on):
                continue
            if slot is not None:
                store.add_file(entry)
            for old in store.superseded(entry):
                disk.remove(old)
                if old.state is None:
                    store.remove(old)
        self._unsaved = not go_on()
        return not self._unsaved

    def _unsaved_entries(self, store: PrefixStore, *, last: bool) -> list[tuple[Entry, Slot | None]]:
        """Entries to write, the most recently used first, with the slots that hold those without a state."""
        found: list[tuple[Entry, Slot | None]] = [
            (entry, None) for entry in store.entries if entry.state is not None and entry.file is None
        ]
        for slot in self._slots:
            if not slot.last_used:
                continue
            lengths = [len(slot.tokens)]
            if last and self._resumes_behind(slot):
                lengths.append(slot.n_resumable)
            for n in lengths:
                held = Entry(
                    slot.scope,
                    slot.adapters,
                    slot.ids(n),
                    used_at=slot.used_at,
                    conversation=slot.conversation,
                )
                if n >= MIN_TOKENS and not any(store.covers(entry, held) for entry, _ in found):
                    found.append((held, slot))
        found.sort(
            key=lambda pair: pair[0].used_at, reverse=True
        )  # stable: of a slot the longer one comes first
        return found
