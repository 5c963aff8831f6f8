"""The table of connection states."""

import pytest

from tinyoai.web.states import TRANSITIONS, Event, State, after


def test_every_state_is_in_the_table_and_can_end() -> None:
    assert set(TRANSITIONS) == set(State)
    for state in set(State) - {State.CLOSED}:
        assert after(state, Event.LOST) is State.CLOSED


def test_a_closing_connection_never_answers_again() -> None:
    reached, frontier = {State.CLOSING}, {State.CLOSING}
    while frontier:
        frontier = {following for state in frontier for following in TRANSITIONS[state].values()} - reached
        reached |= frontier
    assert reached == {State.CLOSING, State.CLOSED}


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (State.HEAD, Event.KEEP_ALIVE),
        (State.ANSWERING, Event.REQUEST),
        (State.CLOSING, Event.REQUEST),
        (State.CLOSING, Event.KEEP_ALIVE),
        *((State.CLOSED, event) for event in Event),
    ],
)
def test_other_transitions_are_errors(state: State, event: Event) -> None:
    with pytest.raises(RuntimeError, match=f"{event.name} in state {state.name}"):
        after(state, event)
