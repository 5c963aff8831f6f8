"""The KV cells that sequences take, of which some belong to several.

A copy of a prefix shares its cells. The sequences form a tree: each node is a run of cells, and a sequence is the
path from the root to its last node.
"""

from collections.abc import Iterable


class _Run:
    """Cells in a row. `n_users` counts the runs that follow it and the sequences that end with it."""

    __slots__ = ("n", "n_users", "parent")

    def __init__(self, parent: "_Run | None", n: int) -> None:
        self.parent = parent
        self.n = n
        self.n_users = 0


class CellCount:
    """Counts the cells in use. Every operation takes time in the number of runs of one sequence."""

    def __init__(self, n_seq: int) -> None:
        self.n_used = 0
        """Cells of all sequences together; a shared one counts once."""
        self._ends: list[_Run | None] = [None] * n_seq
        self._lengths = [0] * n_seq

    def append(self, seq: int, n: int) -> None:
        """The sequence gets n more cells."""
        end = self._ends[seq]
        if end is None or end.n_users > 1:
            self._end_at(seq, _Run(end, n))
        else:
            end.n += n
        self._lengths[seq] += n
        self.n_used += n

    def cut(self, seq: int, n: int) -> None:
        """Drops all but the first n cells of the sequence."""
        if n < self._lengths[seq]:
            self._end_at(seq, self._prefix(seq, n))
            self._lengths[seq] = n

    def copy(self, src: int, dst: int, n: int) -> None:
        """Replaces `dst` by the first n cells of `src`, which both share from here on."""
        if src == dst:
            self.cut(dst, n)
            return
        self._end_at(dst, self._prefix(src, n))
        self._lengths[dst] = n

    def n_used_by(self, seqs: Iterable[int]) -> int:
        """Cells of some of the sequences; a shared one counts once."""
        seen: set[_Run] = set()
        for seq in seqs:
            run = self._ends[seq]
            while run is not None and run not in seen:
                seen.add(run)
                run = run.parent
        return sum(run.n for run in seen)

    def _prefix(self, seq: int, n: int) -> _Run | None:
        """The run that ends after the first n cells of a sequence; a longer one is split there."""
        if n <= 0:
            return None
        run, begin = self._ends[seq], self._lengths[seq]
        while run is not None:
            begin -= run.n
            if begin < n:
                break
            run = run.parent
        if run is None or begin + run.n == n:
            return run
        head = _Run(run.parent, n - begin)
        head.n_users = 1  # the rest of the run, in place of the run
        run.parent, run.n = head, run.n - head.n
        return head

    def _end_at(self, seq: int, run: _Run | None) -> None:
        """Makes a run the last one of a sequence, and frees the runs that nothing uses any more."""
        if run is not None:
            run.n_users += 1
            if run.n_users == 1 and run.parent is not None:  # it is new
                run.parent.n_users += 1
        old, self._ends[seq] = self._ends[seq], run
        while old is not None:
            old.n_users -= 1
            if old.n_users:
                break
            self.n_used -= old.n
            old = old.parent
