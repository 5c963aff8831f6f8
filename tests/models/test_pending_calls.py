"""Every call ends exactly once and its events keep their order, for any messages of a worker."""

import asyncio
import logging
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models.workers import Sink, faulty, generate, run, take_text
from tinyoai import wire
from tinyoai.models.pending_calls import EventQueue, PendingCall, PendingCalls

BODIES: list[wire.Body] = [
    generate("a"),
    generate("b", n=3),
    wire.Embed(prompt=[]),
    wire.Tokenize(prompt=[]),
    wire.Detokenize(ids=[]),
    wire.Rank(query="", document=""),
]


def choice_done(number: int, choice: int = 0) -> wire.ChoiceDone:
    """Returns the end of a choice."""
    return wire.ChoiceDone(
        id=number, choice=choice, finish_reason="stop", n_cached=0, n_generated=1, prompt_ms=0, predicted_ms=0
    )


EVENTS: list[Callable[[int, int], wire.Event]] = [
    lambda i, c: wire.Started(i),
    lambda i, c: wire.Queued(i, 1),
    lambda i, c: wire.Accepted(id=i, n_prompt=1, n_cached=0),
    lambda i, c: wire.Progress(i, 1),
    lambda i, c: wire.Content(id=i, text="x", choice=c),
    lambda i, c: choice_done(i, c),
    lambda i, c: wire.Vector(id=i, values=b""),
    lambda i, c: wire.Score(id=i, value=0.5),
    lambda i, c: wire.Tokens(id=i, ids=[]),
    lambda i, c: wire.PlainText(id=i, text=""),
    lambda i, c: wire.Done(id=i),
    lambda i, c: wire.Failed(id=i, kind="ModelError", message="no"),
]
RESULTS = {
    wire.Embed: wire.Vector,
    wire.Rank: wire.Score,
    wire.Tokenize: wire.Tokens,
    wire.Detokenize: wire.PlainText,
}

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.integers(0, len(BODIES) - 1), st.just(0), st.just(0)),
        st.tuples(st.just("event"), st.integers(-1, 5), st.integers(0, len(EVENTS) - 1), st.integers(-1, 3)),
        # likely sequences, so that later stages are reached
        st.tuples(st.just("advance"), st.integers(1, 4), st.integers(1, 9), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 4), st.just(0), st.just(0)),
        st.tuples(st.just("death"), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=60,
)


def check(body: wire.Body, events: list[wire.Event]) -> None:
    """Checks one call's events against the protocol."""
    finals = [event for event in events if isinstance(event, wire.Final)]
    assert finals == [events[-1]]
    kinds = [type(event) for event in events]
    order = [kind for kind in kinds if kind in (wire.Started, wire.Queued, wire.Accepted)]
    assert order == [wire.Started, wire.Queued, wire.Accepted][: len(order)]
    accepted = kinds.index(wire.Accepted) if wire.Accepted in kinds else len(kinds)
    assert all(at > accepted for at, event in enumerate(events) if isinstance(event, wire.AfterAccepted))
    n = body.n if isinstance(body, wire.Generate) else 0
    ends = [event.choice for event in events if isinstance(event, wire.ChoiceDone)]
    assert len(ends) == len(set(ends))
    assert set(ends) <= set(range(n))
    open_choices = set(range(n))
    for event in events:
        if isinstance(event, wire.Content):
            assert event.choice in open_choices
        elif isinstance(event, wire.ChoiceDone):
            open_choices.remove(event.choice)
    results = [kind for kind in kinds if kind in RESULTS.values()]
    assert results in ([], [RESULTS.get(type(body))])
    if isinstance(finals[0], wire.Done):
        assert not open_choices
        assert n or results


@given(ACTIONS)
def test_every_call_ends_once_and_in_order(actions: list[tuple[str, int, int, int]]) -> None:
    async def body() -> None:
        cancelled: list[PendingCall] = []
        pending, queue, bodies = PendingCalls(cancelled.append), EventQueue(), list[wire.Body]()
        calls: list[PendingCall] = []

        def receive(event: wire.Event) -> None:
            try:
                pending.receive([event])
            except wire.WireError:
                pending.fail_all("WorkerDied", "broke the protocol")

        for action, number, kind, choice in actions:
            if action == "begin":
                calls.append(pending.begin(len(bodies), BODIES[number], queue))
                bodies.append(BODIES[number])
            elif action == "event":
                receive(EVENTS[kind](number, choice))
            elif action == "advance" and number <= len(calls):
                for event in _course(number, bodies[number - 1])[:kind]:
                    receive(event)
            elif action == "cancel" and number < len(calls):
                pending.fail(calls[number], "Cancelled", "left")
            elif action == "death":
                pending.fail_all("WorkerDied", "died")
        pending.fail_all("WorkerDied", "the end")
        assert not pending.open
        assert not cancelled
        by_call: dict[int, list[wire.Event]] = {index: [] for index in range(len(bodies))}
        while queue.events:
            index, event = await queue.get()
            by_call[index].append(event)
        for index, events in by_call.items():
            check(bodies[index], events)
            assert calls[index].ended
            assert calls[index].started == any(isinstance(event, wire.Started) for event in events)

    run(body())


def _course(number: int, body: wire.Body) -> list[wire.Event]:
    """Returns all events of a request that succeeds."""
    if isinstance(body, wire.Tokenize):
        return [wire.Started(number), wire.Tokens(id=number, ids=[]), wire.Done(id=number)]
    if isinstance(body, wire.Detokenize):
        return [wire.Started(number), wire.PlainText(id=number, text=""), wire.Done(id=number)]
    begin = [wire.Started(number), wire.Queued(number, 1), wire.Accepted(id=number, n_prompt=1, n_cached=0)]
    if isinstance(body, wire.Embed):
        return [*begin, wire.Vector(id=number, values=b""), wire.Done(id=number)]
    if isinstance(body, wire.Rank):
        return [*begin, wire.Score(id=number, value=0.5), wire.Done(id=number)]
    contents = [wire.Content(id=number, text="x", choice=choice) for choice in range(body.n)]
    ends = [choice_done(number, choice) for choice in range(body.n)]
    return [*begin, wire.Progress(number, 1), *contents, *ends, wire.Done(id=number)]


@pytest.mark.parametrize("body", BODIES)
def test_a_correct_answer_breaks_no_rule(body: wire.Body) -> None:
    pending, queue = PendingCalls(lambda call: None), EventQueue()
    pending.begin(7, body, queue)
    for event in _course(1, body):
        pending.receive([event])
    assert list(queue.events) == [(7, event) for event in _course(1, body)]
    assert not pending.open


START = [wire.Started(1), wire.Queued(1, 1), wire.Accepted(id=1, n_prompt=1, n_cached=0)]


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (BODIES[0], [wire.Queued(1, 1)]),
        (BODIES[0], [wire.Started(1), wire.Started(1)]),
        (BODIES[0], [wire.Started(1), wire.Accepted(id=1, n_prompt=1, n_cached=0)]),
        (BODIES[0], [wire.Started(1), wire.Content(id=1, text="early")]),
        (BODIES[0], [*START, wire.Accepted(id=1, n_prompt=1, n_cached=0)]),
        (BODIES[0], [*START, wire.Content(id=1, text="x", choice=1)]),
        (BODIES[0], [*START, wire.Done(id=1)]),
        (BODIES[0], [*START, choice_done(1), choice_done(1)]),
        (BODIES[0], [*START, choice_done(1), wire.Content(id=1, text="late")]),
        (BODIES[0], [*START, wire.Vector(id=1, values=b"")]),
        (BODIES[1], [*START, choice_done(1), wire.Done(id=1)]),
        (BODIES[2], [wire.Started(1), wire.Vector(id=1, values=b"")]),
        (BODIES[2], [*START, wire.Vector(id=1, values=b""), wire.Vector(id=1, values=b"")]),
        (BODIES[3], [wire.Started(1), wire.Queued(1, 1)]),
        (BODIES[3], [wire.Tokens(id=1, ids=[])]),
        (BODIES[3], [wire.Started(1), wire.Done(id=1)]),
        (BODIES[0], [wire.Content(id=2, text="never sent")]),
        (BODIES[0], [wire.Failed(id=0, kind="ModelError", message="never sent")]),
    ],
)
def test_a_breach_is_an_error(body: wire.Body, events: list[wire.Event]) -> None:
    pending = PendingCalls(lambda call: None)
    pending.begin(0, body, EventQueue())
    for event in events[:-1]:
        pending.receive([event])
    with pytest.raises(wire.WireError):
        pending.receive([events[-1]])


def test_the_sink_gets_events_unless_something_is_queued_before_them() -> None:
    async def body() -> None:
        willing = True
        sink = Sink(lambda event: willing)
        pending, queue = PendingCalls(lambda call: None), EventQueue()
        pending.begin(0, generate(""), queue, sink)
        pending.receive(START)
        pending.receive([wire.Content(id=1, text="a")])
        assert not queue.events
        willing = False
        pending.receive([wire.Content(id=1, text="b"), wire.Content(id=1, text="c")])
        willing = True
        pending.receive([wire.Content(id=1, text="d")])
        assert sink.text == "a"
        for text in "bcd":
            assert await queue.get() == (0, wire.Content(id=1, text=text))
        pending.receive([wire.Content(id=1, text="e")])
        assert sink.text == "ae"

    run(body())


def test_the_sink_is_flushed_after_each_read_and_the_end_is_queued() -> None:
    pending, sinks = PendingCalls(lambda call: None), [Sink(lambda event: True) for _ in range(2)]
    queues = [EventQueue(), EventQueue()]
    for queue, sink in zip(queues, sinks, strict=True):
        pending.begin(0, generate(""), queue, sink)
    one, two = _course(1, generate("")), _course(2, generate(""))
    beat = wire.Heartbeat(1.0)
    mixed = [message for pair in zip(one[:-2], two[:-2], strict=True) for message in pair]
    assert pending.receive([*mixed, beat]) == [beat]
    assert [sink.reads for sink in sinks] == [[one[1:-2]], [two[1:-2]]]
    pending.receive(two[-2:])
    assert [len(sink.reads) for sink in sinks] == [1, 2]
    assert [list(queue.events) for queue in queues] == [[], [(0, two[-1])]]


def test_the_sink_is_flushed_before_a_breach() -> None:
    sink = Sink(lambda event: True)
    pending, queue = PendingCalls(lambda call: None), EventQueue()
    pending.begin(0, generate(""), queue, sink)
    with pytest.raises(wire.WireError):
        pending.receive([*START, wire.Content(id=1, text="x"), wire.Vector(id=1, values=b"")])
    assert sink.reads == [[*START[1:], wire.Content(id=1, text="x")]]


class _BrokenFlush(Sink):
    """Fails when it is flushed."""

    def flush(self) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("sink", [Sink(faulty), _BrokenFlush(take_text)])
def test_a_fault_in_a_sink_fails_its_call_alone(sink: Sink, caplog: pytest.LogCaptureFixture) -> None:
    cancelled: list[int] = []
    pending, queues = PendingCalls(lambda call: cancelled.append(call.id)), [EventQueue(), EventQueue()]
    for queue in queues:
        call = pending.begin(0, generate(""), queue, sink if queue is queues[0] else None)
        pending.receive(_course(call.id, generate(""))[:3])
    queues[0].events.clear()
    with caplog.at_level(logging.CRITICAL, "tinyoai.worker"):
        pending.receive([wire.Content(id=1, text="x")])
        pending.receive([wire.Content(id=1, text="the worker has not seen the cancel"), wire.Done(id=1)])
    ((_, failed),) = queues[0].events
    assert isinstance(failed, wire.Failed)
    assert failed.kind == "InternalError"
    assert cancelled == [1]
    pending.receive(_course(2, generate(""))[3:])
    assert isinstance(queues[1].events[-1][1], wire.Done)


def test_a_reader_that_is_cancelled_loses_nothing() -> None:
    async def body() -> None:
        queue = EventQueue()
        reader = asyncio.ensure_future(queue.get())
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait({reader})
        queue.put(1, wire.Started(1))
        assert await queue.get() == (1, wire.Started(1))

    run(body())
