"""The count of KV cells against sets of numbered cells."""

from itertools import count
from random import Random

import pytest

from tinyoai.engine.cells import CellCount

N_SEQ = 5


@pytest.mark.parametrize("seed", range(60))
def test_the_count_is_that_of_distinct_cells(seed: int) -> None:
    draw, numbers = Random(seed), count()
    cells = CellCount(N_SEQ)
    known: list[list[int]] = [[] for _ in range(N_SEQ)]
    for _ in range(200):
        seq, kind = draw.randrange(N_SEQ), draw.random()
        if kind < 0.5:
            n = draw.randint(1, 9)
            cells.append(seq, n)
            known[seq] += [next(numbers) for _ in range(n)]
        elif kind < 0.75:
            n = draw.randint(0, len(known[seq]))
            cells.cut(seq, n)
            del known[seq][n:]
        else:
            src = draw.randrange(N_SEQ)
            n = draw.randint(0, len(known[src]))
            cells.copy(src, seq, n)
            known[seq] = known[src][:n]
        assert cells.n_used == len({cell for each in known for cell in each})
        some = draw.sample(range(N_SEQ), draw.randint(0, N_SEQ))
        assert cells.n_used_by(some) == len({cell for i in some for cell in known[i]})
