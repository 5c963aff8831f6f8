"""The number of leading tokens whose states equal those of a fresh prefill, for any chunks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai.engine.ctransformers.exact_prefix import ExactPrefix


@pytest.mark.parametrize(
    ("chunks", "n_keep", "n_prompt", "expected"),
    [
        # a prompt of 10 tokens in blocks of 4: complete to 8, and two tokens of a partial block
        ([10], 10, 10, 10),
        ([10], 10, 11, 10),
        # the next prompt fills the third block, so its tokens must be evaluated again
        ([10], 10, 12, 8),
        ([10], 10, 40, 8),
        ([10], 7, 40, 7),
        # tokens decoded one by one are partial, except the last of each block
        ([8, 1, 1, 1], 11, 11, 11),
        ([8, 1, 1, 1, 1], 12, 14, 8),
        ([8, 1, 1, 1, 1, 1], 13, 13, 8),
        ([2, 2], 4, 5, 0),
        ([], 0, 5, 0),
        ([], 3, 5, 0),
    ],
)
def test_tokens_that_equal_a_fresh_prefill(
    chunks: list[int], n_keep: int, n_prompt: int, expected: int
) -> None:
    sequence = ExactPrefix(4)
    for n in chunks:
        sequence.append(n)
    assert sequence.length(n_keep, n_prompt) == expected


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 4, 8]))
def test_a_fresh_prefill_is_always_exact_for_itself(n: int, batch_blocks: int, block: int) -> None:
    sequence, batch = ExactPrefix(block), block * batch_blocks
    for begin in range(0, n, batch):
        sequence.append(min(batch, n - begin))
    assert sequence.length(n, n) == n


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_a_truncated_sequence_has_no_more_than_it_keeps(n: int, n_keep: int, more: int) -> None:
    sequence, expected = ExactPrefix(4), ExactPrefix(4)
    sequence.append(n)
    sequence.truncate(n_keep)
    for one in (sequence, expected):
        one.append(more)
    assert sequence.length(n_keep + more, 1) <= min(n, n_keep) + more
