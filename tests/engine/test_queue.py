"""The line before the slots: turns, order, limits, lateness; held against a plain model of it."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai.engine.queue import Line


@dataclass(eq=False)
class Item:
    """Somebody who waits."""

    name: str
    client: str
    group: str = ""
    give_up_at: float = float("inf")

    def __post_init__(self) -> None:
        self.group = self.group or self.name


def names(line: Line[Item]) -> list[str]:
    """Everybody in the order of service."""
    return [line.pop().name for _ in range(len(line))]


def test_clients_take_turns() -> None:
    line: Line[Item] = Line(10)
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        assert line.push(Item(name, name[0]))
    assert names(line) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_newcomer_is_served_before_the_second_of_one_who_sent_many() -> None:
    line: Line[Item] = Line(10)
    for name in ("a1", "a2", "a3"):
        line.push(Item(name, "a"))
    assert line.pop().name == "a1"
    line.push(Item("b1", "b"))
    assert [line.pop().name for _ in range(2)] == ["a2", "b1"]


def test_it_is_full_of_requests_not_of_their_parts() -> None:
    line: Line[Item] = Line(2)
    assert all(line.push(Item(f"part {i}", "a", "one")) for i in range(100))
    assert line.push(Item("two", "a"))
    assert not line.push(Item("three", "b"))
    assert line.push(Item("part 101", "a", "one"))
    assert line.push(Item("three", "b"), n_free=1)
    assert line.n_requests == 3


def test_a_line_of_none_lets_in_who_finds_a_free_slot() -> None:
    line: Line[Item] = Line(0)
    assert not line.push(Item("a", "a"))
    assert line.push(Item("a", "a"), n_free=1)


def test_who_is_late_leaves() -> None:
    line: Line[Item] = Line(9)
    for i in range(6):
        line.push(Item(str(i), "ab"[i % 2], give_up_at=float(i)))
    assert sorted(item.name for item in line.expired(3.0)) == ["0", "1", "2", "3"]
    assert line.expired(3.0) == []
    assert sorted(names(line)) == ["4", "5"]


def test_nobody_to_take_out() -> None:
    line: Line[Item] = Line(1)
    with pytest.raises(IndexError):
        line.pop()
    with pytest.raises(ValueError):
        line.remove(Item("a", "a"))


@given(st.lists(st.one_of(st.sampled_from("abc"), st.just("pop"), st.just("remove")), max_size=60))
def test_fair_whatever_happens(steps: list[str]) -> None:
    line: Line[Item] = Line(1000)
    inside: list[Item] = []
    served: list[str] = []
    for i, step in enumerate(steps):
        if step == "pop":
            if not inside:
                continue
            item = line.pop()
            # nobody of the same client came before, and no client waits that was served longer ago
            assert all(inside.index(item) <= inside.index(o) for o in inside if o.client == item.client)
            inside.remove(item)
            served.append(item.client)
        elif step == "remove":
            if inside:
                line.remove(gone := inside[len(inside) // 2])
                inside.remove(gone)
        else:
            inside.append(Item(str(i), step))
            line.push(inside[-1])
        assert len(line) == len(inside) == line.n_requests
    while inside:
        present = {item.client for item in inside}
        turn = [line.pop() for _ in present]
        assert {item.client for item in turn} == present
        for item in turn:
            inside.remove(item)
    assert line.first() is None
