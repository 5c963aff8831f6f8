"""The queue: turns, order, limits and deadlines, compared with a simple model."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai.engine.queue import FairQueue


@dataclass(eq=False)
class Item:
    """A queued item."""

    name: str
    client: str
    group: str = ""
    queue_deadline: float = float("inf")

    def __post_init__(self) -> None:
        self.group = self.group or self.name


def pop(queue: FairQueue[Item]) -> Item:
    """Removes the first item and returns it."""
    item = queue.first()
    assert item is not None
    queue.pop(item)
    return item


def names(queue: FairQueue[Item]) -> list[str]:
    """Removes all items and returns their names in the order of service."""
    return [pop(queue).name for _ in range(len(queue))]


def test_clients_take_turns() -> None:
    queue: FairQueue[Item] = FairQueue(10)
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        assert queue.push(Item(name, name[0]))
    assert names(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_new_client_is_served_before_the_second_item_of_another() -> None:
    queue: FairQueue[Item] = FairQueue(10)
    for name in ("a1", "a2", "a3"):
        queue.push(Item(name, "a"))
    assert pop(queue).name == "a1"
    queue.push(Item("b1", "b"))
    assert [pop(queue).name for _ in range(2)] == ["a2", "b1"]


def test_the_bound_counts_requests_not_their_parts() -> None:
    queue: FairQueue[Item] = FairQueue(2)
    assert all(queue.push(Item(f"part {i}", "a", "one")) for i in range(100))
    assert queue.push(Item("two", "a"))
    assert not queue.push(Item("three", "b"))
    assert queue.push(Item("part 101", "a", "one"))
    assert queue.push(Item("three", "b"), n_free=1)
    assert queue.n_requests == 3


def test_a_queue_of_length_zero_takes_items_for_free_slots() -> None:
    queue: FairQueue[Item] = FairQueue(0)
    assert not queue.push(Item("a", "a"))
    assert queue.push(Item("a", "a"), n_free=1)


def test_expired_items_leave() -> None:
    queue: FairQueue[Item] = FairQueue(9)
    for i in range(6):
        queue.push(Item(str(i), "ab"[i % 2], queue_deadline=float(i)))
    assert sorted(item.name for item in queue.expired(3.0)) == ["0", "1", "2", "3"]
    assert queue.expired(3.0) == []
    assert sorted(names(queue)) == ["4", "5"]


def test_an_item_that_is_not_queued() -> None:
    queue: FairQueue[Item] = FairQueue(1)
    assert queue.first() is None
    with pytest.raises(ValueError):
        queue.pop(Item("a", "a"))
    with pytest.raises(ValueError):
        queue.remove(Item("a", "a"))


@given(st.lists(st.one_of(st.sampled_from("abc"), st.just("pop"), st.just("remove")), max_size=60))
def test_the_queue_is_fair_after_any_steps(steps: list[str]) -> None:
    queue: FairQueue[Item] = FairQueue(1000)
    inside: list[Item] = []
    served: list[str] = []
    for i, step in enumerate(steps):
        if step == "pop":
            if not inside:
                continue
            item = pop(queue)
            # items of a client leave in order, and no waiting client was served longer ago
            assert all(inside.index(item) <= inside.index(o) for o in inside if o.client == item.client)
            inside.remove(item)
            served.append(item.client)
        elif step == "remove":
            if inside:
                queue.remove(gone := inside[len(inside) // 2])
                inside.remove(gone)
        else:
            inside.append(Item(str(i), step))
            queue.push(inside[-1])
        assert len(queue) == len(inside) == queue.n_requests
    while inside:
        present = {item.client for item in inside}
        turn = [pop(queue) for _ in present]
        assert {item.client for item in turn} == present
        for item in turn:
            inside.remove(item)
    assert queue.first() is None


def test_an_item_that_is_put_back_keeps_its_place_and_loses_its_turn() -> None:
    queue: FairQueue[Item] = FairQueue(9)
    for name in ("a1", "a2", "b1"):
        queue.push(Item(name, name[0]))
    first = pop(queue)
    queue.push_front(first)
    assert names(queue) == ["b1", "a1", "a2"]


def test_an_item_that_is_not_ready_blocks_its_client_alone() -> None:
    queue: FairQueue[Item] = FairQueue(9)
    for name in ("a1", "a2", "b1"):
        queue.push(Item(name, name[0]))
    found = queue.first(lambda item: item.name != "a1")
    assert found is not None
    assert found.name == "b1"


def test_looking_for_expired_items_does_not_walk_the_queue() -> None:
    looked = 0

    class Counted(Item):
        @property  # type: ignore[override]
        def queue_deadline(self) -> float:
            nonlocal looked
            looked += 1
            return 100.0

        @queue_deadline.setter
        def queue_deadline(self, value: float) -> None: ...

    queue: FairQueue[Item] = FairQueue(10_000)
    for i in range(1000):
        queue.push(Counted(str(i), "a"))
    before = looked
    for _ in range(100):
        assert queue.expired(1.0) == []
    assert looked == before


@given(st.lists(st.tuples(st.floats(0, 10), st.booleans()), max_size=40), st.floats(0, 10))
def test_exactly_the_late_items_expire(items: list[tuple[float, bool]], now: float) -> None:
    queue: FairQueue[Item] = FairQueue(100)
    inside = [Item(str(i), "ab"[i % 2], queue_deadline=at) for i, (at, _) in enumerate(items)]
    for item in inside:
        queue.push(item)
    for item, (_, gone) in zip(list(inside), items, strict=True):
        if gone:
            queue.remove(item)
            inside.remove(item)
    late = queue.expired(now)
    assert {item.name for item in late} == {item.name for item in inside if item.queue_deadline <= now}
    assert len(queue) == len(inside) - len(late)
