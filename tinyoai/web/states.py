"""The states of a connection and one table of their transitions, in h11's manner."""

from enum import Enum


class State(Enum):
    """What a connection does at the moment."""

    HEAD = "head"
    """It waits for a request's head."""
    ANSWERING = "answering"
    """One exchange is under way. Its body may still arrive."""
    CLOSING = "closing"
    """Input is discarded until the peer has read the answer."""
    CLOSED = "closed"
    """The socket is gone."""


class Event(Enum):
    """What moves a connection from one state to another."""

    REQUEST = "request"
    """A head was read, or refused: one response is due."""
    KEEP_ALIVE = "keep-alive"
    """The response is complete and the connection stays open."""
    CLOSE = "close"
    """The server closes the connection."""
    CLIENT_LEFT = "client left"
    """The client closed the connection or its sending half."""
    LOST = "lost"
    """The socket is gone."""


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.HEAD: {
        Event.REQUEST: State.ANSWERING,
        Event.CLOSE: State.CLOSING,
        Event.CLIENT_LEFT: State.CLOSING,
        Event.LOST: State.CLOSED,
    },
    State.ANSWERING: {
        Event.KEEP_ALIVE: State.HEAD,
        Event.CLOSE: State.CLOSING,
        Event.CLIENT_LEFT: State.CLOSING,
        Event.LOST: State.CLOSED,
    },
    State.CLOSING: {
        Event.CLOSE: State.CLOSING,
        Event.CLIENT_LEFT: State.CLOSING,
        Event.LOST: State.CLOSED,
    },
    State.CLOSED: {},
}
"""Every allowed transition. A pair that is missing here is a bug in the caller."""


def after(state: State, event: Event) -> State:
    """Returns the state that follows. Raises RuntimeError for a transition that is not in the table."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise RuntimeError(f"a connection cannot handle {event.name} in state {state.name}") from None
