"""Which slot a prompt gets, and what is kept of its cache."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai.engine.slots import Slot, choose, common_prefix

IDS = st.lists(st.integers(0, 3), max_size=40)


@given(IDS, IDS, IDS)
def test_common_prefix_is_what_a_loop_would_count(shared: list[int], a: list[int], b: list[int]) -> None:
    a, b = shared + a, shared + b
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    assert common_prefix(a, b) == count


def slot(index: int, tokens: list[int], *, busy: bool = False, last_used: int = 0) -> Slot:
    made = Slot(index)
    made.append(tokens)
    made.busy, made.last_used = busy, last_used
    return made


LONG = list(range(100))


@pytest.mark.parametrize(
    ("slots", "prompt", "expected"),
    [
        ([slot(0, []), slot(1, [])], [1, 2], (0, 0)),
        ([slot(0, [1, 2]), slot(1, [1, 2, 3])], [1, 2, 3, 4], (1, 3)),
        # all of the prompt is cached: its last token is evaluated again, for its logits
        ([slot(0, [1, 2, 3])], [1, 2, 3], (0, 2)),
        ([slot(0, [1, 2, 3], busy=True), slot(1, [])], [1, 2, 3, 4], (1, 0)),
        ([slot(0, [1], busy=True)], [1], None),
        # a few shared tokens are not worth another conversation's cache while a slot is empty
        ([slot(0, LONG, last_used=2), slot(1, [])], [0, 1, 7, 7, 7], (1, 0)),
        ([slot(0, LONG, last_used=1), slot(1, LONG[:90], last_used=2)], [*LONG, 7], (0, 100)),
        # nothing matches: the one unused for longest goes
        ([slot(0, LONG, last_used=5), slot(1, LONG, last_used=4)], [7, 7], (1, 0)),
    ],
)
def test_choose(slots: list[Slot], prompt: list[int], expected: tuple[int, int] | None) -> None:
    found = choose(slots, prompt, exact=False)
    assert (found and (found[0].index, found[1])) == expected


@pytest.mark.parametrize(
    ("chunks", "n_keep", "n_prompt", "expected"),
    [
        # a prompt of 10 in blocks of 4: whole to 8, part for two
        ([10], 10, 10, 10),
        ([10], 10, 11, 10),
        # the next prompt fills the third block, so its tokens must be evaluated anew
        ([10], 10, 12, 8),
        ([10], 10, 40, 8),
        ([10], 7, 40, 7),
        # tokens decoded one by one are part, but for the last of each block
        ([8, 1, 1, 1], 11, 11, 11),
        ([8, 1, 1, 1, 1], 12, 14, 8),
        ([8, 1, 1, 1, 1, 1], 13, 13, 8),
        ([2, 2], 4, 5, 0),
        ([], 0, 5, 0),
    ],
)
def test_what_is_as_a_fresh_prefill_gives_it(
    chunks: list[int], n_keep: int, n_prompt: int, expected: int
) -> None:
    made = Slot(0, block=4)
    for n in chunks:
        made.append([7] * n)
    assert made.n_exact(n_keep, n_prompt) == expected


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 4, 8]))
def test_a_fresh_prefill_is_always_exact_for_itself(n: int, batch_blocks: int, block: int) -> None:
    made, batch = Slot(0, block), block * batch_blocks
    for begin in range(0, n, batch):
        made.append([1] * min(batch, n - begin))
    assert made.n_exact(n, n) == n
