"""The slot that a prompt gets, and how much of its cache is kept, depending on the engine's capabilities."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai.engine.contract import Capabilities, Copies, Truncates
from tinyoai.engine.prefix_reuse import Assignment, choose, common_prefix, packed
from tinyoai.engine.slots import Slot

IDS = st.lists(st.integers(0, 3), max_size=40)


@given(IDS, IDS, IDS)
def test_common_prefix_equals_a_plain_loop(shared: list[int], a: list[int], b: list[int]) -> None:
    a, b = shared + a, shared + b
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    assert common_prefix(a, b) == count


def caps(**fields: object) -> Capabilities:
    """Returns capabilities that differ in the fields that matter here."""
    sizes = dict.fromkeys(("n_seq", "n_ctx", "n_batch", "n_row", "n_kv", "n_outputs"), 4096)
    return Capabilities(**(sizes | fields))  # type: ignore[arg-type]


def assign(slots: list[Slot], prompt: list[int], **fields: object) -> Assignment | None:
    """Returns the assignment of a prompt whose tokens may all be reused."""
    return choose(slots, prompt, caps(**fields), n_reusable=len(prompt))


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
        # the whole prompt is cached: its last token is evaluated again, for its logits
        ([slot(0, [1, 2, 3])], [1, 2, 3], (0, 2)),
        ([slot(0, [1, 2, 3], busy=True), slot(1, [])], [1, 2, 3, 4], (1, 0)),
        ([slot(0, [1], busy=True)], [1], None),
        # a few shared tokens do not justify overwriting another conversation while a slot is empty
        ([slot(0, LONG, last_used=2), slot(1, [])], [0, 1, 7, 7, 7], (1, 0)),
        ([slot(0, LONG, last_used=1), slot(1, LONG[:90], last_used=2)], [*LONG, 7], (0, 100)),
        # nothing matches: the least recently used slot is taken
        ([slot(0, LONG, last_used=5), slot(1, LONG, last_used=4)], [7, 7], (1, 0)),
    ],
)
def test_choose(slots: list[Slot], prompt: list[int], expected: tuple[int, int] | None) -> None:
    found = assign(slots, prompt)
    assert (found and (found.slot.index, found.n_keep)) == expected


def test_no_more_is_kept_than_may_be_reused() -> None:
    held = slot(0, LONG)
    found = choose([held], [*LONG, 7], caps(), n_reusable=10)
    assert found == Assignment(held, 10)
    assert choose([held], [*LONG, 7], caps(), n_reusable=0) == Assignment(held, 0)


def test_an_exact_request_keeps_what_the_engine_says() -> None:
    asked = []

    def exact(seq: int, n: int, n_prompt: int) -> int:
        asked.append((seq, n, n_prompt))
        return n - n % 32

    held = slot(3, LONG)
    assert choose([held], [*LONG, 7], caps(), n_reusable=101, exact=exact) == Assignment(held, 96)
    assert asked[0] == (3, 100, 101)


def test_the_cache_of_another_adapter_is_not_reused() -> None:
    held = slot(0, LONG)
    held.adapters = ("lora",)
    assert assign([held], [*LONG, 7]) == Assignment(held, 0)
    assert choose([held], [*LONG, 7], caps(), n_reusable=101, adapters=("lora",)) == Assignment(held, 100)


def test_an_engine_that_cannot_truncate_keeps_all_or_nothing() -> None:
    held = slot(0, LONG)
    assert assign([held], [*LONG, 7], truncates=Truncates.NEVER) == Assignment(held, 100)
    assert assign([held], [*LONG[:50], 7], truncates=Truncates.NEVER) == Assignment(held, 0)


@pytest.mark.parametrize("copies", [Copies.PREFIX, Copies.WHOLE])
def test_a_busy_slot_s_prefix_is_copied(copies: Copies) -> None:
    busy, old, new = slot(0, LONG, busy=True), slot(1, [9], last_used=1), slot(2, [9], last_used=2)
    assert assign([busy, old, new], [*LONG, 7]) == Assignment(old, 0)
    assert assign([busy, old, new], [*LONG, 7], copies=copies) == Assignment(old, 100, busy)
    # the slot's own cache is equally long: no copy
    own = slot(1, LONG)
    assert assign([busy, own], [*LONG, 7], copies=copies) == Assignment(own, 100)
    assert assign([busy], [*LONG, 7], copies=copies) is None


def test_a_whole_copy_that_cannot_be_cut_must_fit_exactly() -> None:
    busy, free = slot(0, LONG, busy=True), slot(1, [])
    never = {"copies": Copies.WHOLE, "truncates": Truncates.NEVER}
    assert assign([busy, free], [*LONG, 7], **never) == Assignment(free, 100, busy)
    assert assign([busy, free], [*LONG[:60], 7], **never) == Assignment(free, 0)


def test_a_prompt_gets_the_slot_beside_those_that_are_busy() -> None:
    slots = [Slot(i) for i in range(6)]
    found = Assignment(slots[5], 0)
    assert packed(found, slots) is found
    slots[2].busy = True
    assert packed(found, slots).slot is slots[1]
    slots[1].busy = True
    assert packed(Assignment(slots[5], 7), slots) == Assignment(slots[0], 7, slots[5])
    assert packed(Assignment(slots[5], 7, slots[0]), slots) == Assignment(slots[0], 7)
    assert packed(Assignment(slots[5], 7, slots[2]), slots) == Assignment(slots[0], 7, slots[2])
