"""The scheduler over the scripted engine: protocol, reuse, fairness, and every way a request ends."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from tinyoai import wire
from tinyoai.engine.contract import Copies, Engine, EngineError, Interrupted, NoRoom, Partial, Row, Want
from tinyoai.engine.fake import FakeEngine
from tinyoai.engine.generate import GenerateTask
from tinyoai.engine.prefix_store import PrefixStore
from tinyoai.engine.rendering import ChatRenderer
from tinyoai.engine.requests import prepare
from tinyoai.engine.scheduler import STARTED_BY_S, Scheduler

IDS = itertools.count(1)


def chat(text: str) -> wire.Conversation:
    """Returns the prompt of a conversation with one message."""
    return wire.Conversation(messages=[wire.Message(role="user", content=text)])


def ask(text: str, *, client: str = "", deadline: float | None = None, **fields: Any) -> wire.Request:
    """Returns a Generate in a request with a new id."""
    fields.setdefault("sampling", wire.Sampling(temperature=0.0))
    fields.setdefault("prompt", chat(text))
    return wire.Request(id=next(IDS), body=wire.Generate(**fields), client=client, deadline=deadline)


class Clock:
    """A clock that advances by one millisecond at each reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


RENDERER = ChatRenderer(wire.Load(path="", name="fake", engine="fake"), FakeEngine(name="fake"))


def scheduler(
    n_slots: int = 2, n_queue: int = 8, n_ctx: int = 512, n_batch: int = 8, **caps: Any
) -> tuple[Scheduler, FakeEngine]:
    """Returns a scheduler and its engine."""
    engine = FakeEngine(name="fake", n_slots=n_slots, n_ctx=n_ctx, n_batch=n_batch, **caps)
    return Scheduler(engine, n_queue=n_queue, clock=Clock(), queue_timeout_s=1000.0), engine


def start(s: Scheduler, engine: Engine) -> list[wire.ToServer]:
    """Prepares all requests that the scheduler wants to start, as the tokenizer thread does."""
    out: list[wire.ToServer] = []
    while (queued := s.next_to_prepare()) is not None:
        out += s.prepared(queued.id, prepare(queued.request, engine, RENDERER))
    return out


def submit(s: Scheduler, engine: Engine, request: wire.Request) -> list[wire.ToServer]:
    """Queues a request and starts what can start. Returns the events without the Queued."""
    out = [*s.submit(request), *start(s, engine)]
    return [event for event in out if not isinstance(event, wire.Queued)]


def everything(s: Scheduler, out: list[wire.ToServer]) -> list[wire.ToServer]:
    """Steps until the scheduler is idle and returns all events."""
    while not s.idle:
        out += start(s, s._engine)
        out += s.step()
    return out


def finish(s: Scheduler, out: list[wire.ToServer] | None = None, steps: int = 20_000) -> list[wire.ToServer]:
    """Steps until the scheduler is idle and returns all events but Queued and Progress."""
    out = out if out is not None else []
    for _ in range(steps):
        if s.idle:
            return [e for e in out if not isinstance(e, wire.Queued | wire.Progress)]
        out += start(s, s._engine)
        out += s.step()
    raise AssertionError("the scheduler never became idle")


def run(request: wire.Request, **kwargs: Any) -> list[wire.ToServer]:
    """Runs one request alone and returns its events."""
    s, engine = scheduler(**kwargs)
    return finish(s, submit(s, engine, request))


def text_of(events: list[wire.ToServer], request_id: int | None = None, choice: int = 0) -> str:
    """Returns the whole text of one choice."""
    return "".join(
        e.text
        for e in events
        if isinstance(e, wire.Content) and e.choice == choice and request_id in (None, e.id)
    )


def last(events: list[wire.ToServer]) -> Any:
    """Returns the event that ended the request."""
    return events[-1]


def ends(events: list[wire.ToServer]) -> list[wire.ChoiceDone]:
    """Returns every ChoiceDone."""
    return [e for e in events if isinstance(e, wire.ChoiceDone)]


def test_an_answer_is_complete_and_ends() -> None:
    events = run(ask("héllo \N{GRINNING FACE}"))
    assert isinstance(events[0], wire.Accepted)
    assert text_of(events) == "héllo \N{GRINNING FACE}"
    assert ends(events)[0].finish_reason == "stop"
    assert ends(events)[0].n_generated == len("héllo \N{GRINNING FACE}".encode()) + 1


def test_no_delta_splits_a_code_point() -> None:
    events = run(ask("a\N{GRINNING FACE}b"))
    assert [e.text for e in events if isinstance(e, wire.Content)] == ["a", "\N{GRINNING FACE}", "b"]


@pytest.mark.parametrize(
    ("limit", "reason", "text"), [(3, "length", "abc"), (6, "length", "abcdef"), (7, "stop", "abcdef")]
)
def test_max_tokens(limit: int, reason: str, text: str) -> None:
    events = run(ask("abcdef", max_tokens=limit))
    assert (text_of(events), ends(events)[0].finish_reason) == (text, reason)


def test_max_tokens_cuts_a_code_point_into_a_replacement_character() -> None:
    assert text_of(run(ask("a\N{GRINNING FACE}", max_tokens=3))) == "a\N{REPLACEMENT CHARACTER}"


def test_the_end_of_the_context_is_a_length_finish() -> None:
    request = ask('!{"text": "x", "repeat": 1000}')
    events = run(request, n_ctx=128)
    n_prompt = next(e.n_prompt for e in events if isinstance(e, wire.Accepted))
    assert ends(events)[0].finish_reason == "length"
    assert ends(events)[0].n_generated == 128 - n_prompt


@pytest.mark.parametrize("n_ctx", [50, 49, 20])
def test_a_prompt_that_fills_the_context_is_refused_with_both_counts(n_ctx: int) -> None:
    request = ask("x" * 30)
    n_prompt = 1 + 1 + len("user\n") + 30 + 1 + 1 + 1 + len("assistant\n")
    events = run(request, n_ctx=min(n_ctx, n_prompt))
    assert last(events).kind == "ContextLengthExceeded"
    assert str(min(n_ctx, n_prompt)) in last(events).message
    assert last(events).param == "messages"


def test_a_stop_sequence_ends_an_answer_and_is_not_sent() -> None:
    events = run(ask("one two three", stop=["two"]))
    assert text_of(events) == "one "
    assert ends(events)[0].finish_reason == "stop"


def test_text_that_only_began_like_a_stop_sequence_is_sent() -> None:
    assert text_of(run(ask("one tw", stop=["two"]))) == "one tw"


def test_ignore_eos_generates_to_the_limit() -> None:
    events = run(ask("ab", ignore_eos=True, max_tokens=40))
    assert ends(events)[0].finish_reason == "length"
    assert ends(events)[0].n_generated == 40


def test_min_tokens_delays_the_end() -> None:
    events = run(ask("ab", min_tokens=10))
    assert ends(events)[0].n_generated >= 10


def test_logprobs_go_with_their_text() -> None:
    events = run(ask("abc", logprobs=2, stop=["zz"]))
    deltas = [e for e in events if isinstance(e, wire.Content)]
    entries = [entry for e in deltas for entry in e.logprobs]
    assert b"".join(entry.piece for entry in entries).decode() == text_of(events) == "abc"
    assert all(entry.logprob is not None and entry.logprob > -1e-3 for entry in entries)
    assert all(len(entry.top) == 2 and entry.top[0][0] == entry.piece for entry in entries)


def test_logprobs_of_a_stopped_answer_end_before_the_stop() -> None:
    events = run(ask("one two", logprobs=0, stop=[" two"]))
    entries = [entry for e in events if isinstance(e, wire.Content) for entry in e.logprobs]
    assert b"".join(entry.piece for entry in entries) == b"one"


def test_echo_with_logprobs_scores_the_prompt() -> None:
    request = ask("", prompt=[wire.Special("bos"), wire.Text("abcd")], echo=True, logprobs=1, max_tokens=2)
    events = run(request)
    assert text_of(events) == "abcdef"
    entries = [entry for e in events if isinstance(e, wire.Content) for entry in e.logprobs]
    assert [entry.piece for entry in entries] == [b"a", b"b", b"c", b"d", b"e", b"f"]
    assert entries[0].logprob is None
    # the fake engine continues the alphabet, so b after a is nearly certain
    assert all(entry.logprob is not None and entry.logprob > -1e-3 for entry in entries[1:])


def test_echo_without_anything_to_generate() -> None:
    events = run(ask("", prompt=[wire.Ids([97, 98])], echo=True, max_tokens=0))
    assert text_of(events) == "ab"
    assert (ends(events)[0].finish_reason, ends(events)[0].n_generated) == ("length", 0)


@pytest.mark.parametrize(
    ("request_", "kind", "param"),
    [
        (ask("", prompt=[wire.Ids([260])], param="prompt"), "BadRequest", "prompt"),
        (ask("", prompt=[wire.Ids([-1])], param="prompt"), "BadRequest", "prompt"),
        (ask("", prompt=[wire.Ids([])], param="prompt"), "BadRequest", "prompt"),
        (ask("a", sampling=wire.Sampling(logit_bias={260: 1.0})), "BadRequest", "logit_bias"),
        (ask("x" * 10_000), "ContextLengthExceeded", "messages"),
    ],
)
def test_refused_before_it_is_accepted(request_: wire.Request, kind: str, param: str) -> None:
    events = run(request_)
    assert [type(e) for e in events] == [wire.Failed]
    assert (last(events).kind, last(events).param) == (kind, param)


def test_a_ban_on_every_token_is_the_clients_mistake() -> None:
    banned = wire.Sampling(logit_bias=dict.fromkeys(range(260), -100.0))
    assert last(run(ask("a", sampling=banned))).kind == "BadRequest"


def test_not_finite_logits_end_one_request_and_no_other() -> None:
    s, engine = scheduler()
    out = submit(s, engine, ask('!{"text": "abc", "nan_at": 1}'))
    good = ask("fine")
    out += submit(s, engine, good)
    events = finish(s, out)
    failed = [e for e in events if isinstance(e, wire.Failed)]
    assert [e.kind for e in failed] == ["ModelError"]
    assert text_of(events, good.id) == "fine"


def test_an_engine_that_raises_ends_the_request_and_serves_the_next() -> None:
    s, engine = scheduler()
    events = finish(s, submit(s, engine, ask('!{"text": "abc", "fail_at": 1}')))
    assert last(events).kind == "ModelError"
    assert text_of(finish(s, submit(s, engine, ask("next")))) == "next"


def test_a_conversation_finds_its_own_cache() -> None:
    s, engine = scheduler(n_slots=2)
    first = finish(s, submit(s, engine, ask("tell me something long enough")))
    again = finish(s, submit(s, engine, ask("tell me something long enough")))
    n_prompt = again[0].n_prompt  # type: ignore[union-attr]
    assert again[0].n_cached == n_prompt - 1  # type: ignore[union-attr]
    assert text_of(first) == text_of(again)


def test_a_full_queue_is_an_error() -> None:
    s, engine = scheduler(n_slots=1, n_queue=2)
    out = submit(s, engine, ask("a"))
    s.step()
    for _ in range(2):
        assert submit(s, engine, ask("b")) == []
    refused = submit(s, engine, ask("c"))
    assert isinstance(refused[0], wire.Failed)
    assert refused[0].kind == "Overloaded"
    assert refused[0].retry_after
    finish(s, out)


def test_cancel_frees_the_slot_and_keeps_its_prefix() -> None:
    s, engine = scheduler(n_slots=1)
    request = ask('!{"text": "x", "repeat": 200}')
    out = submit(s, engine, request)
    while text_of(out) == "":
        out += s.step()
    ended = s.cancel(request.id)
    assert isinstance(ended[0], wire.Failed)
    assert s.idle
    assert s.cancel(request.id) == []
    after = finish(s, submit(s, engine, ask('!{"text": "x", "repeat": 200}', max_tokens=1)))
    assert after[0].n_cached > 10  # type: ignore[union-attr]


def test_a_queued_request_that_is_cancelled_never_runs() -> None:
    s, engine = scheduler(n_slots=1)
    running, queued = ask("abc"), ask("queued")
    out = submit(s, engine, running)
    out += s.step()
    out += submit(s, engine, queued)
    out += s.cancel(queued.id)
    events = finish(s, out)
    assert text_of(events, running.id) == "abc"
    assert not any(isinstance(e, wire.Accepted) and e.id == queued.id for e in events)


def test_a_long_prefill_does_not_stop_running_decodes() -> None:
    s, engine = scheduler(n_slots=2, n_ctx=4096)
    talker = ask('!{"text": "x", "repeat": 600}')
    out = submit(s, engine, talker)
    while text_of(out) == "":
        out += s.step()
    reader = ask("y" * 400)
    out = submit(s, engine, reader)
    spoken = 0
    while not any(isinstance(e, wire.Content) and e.id == reader.id for e in out):
        out += s.step()
    spoken = len(text_of(out, talker.id))
    n_chunks = 400 // engine.caps.n_row
    # each chunk lets at least one token decode, and the prefill makes progress too
    assert n_chunks <= spoken < 600
    finish(s, out)


def test_sampled_text_is_the_same_beside_other_requests() -> None:
    def request() -> wire.Request:
        return ask('!{"spread": 2.0}', sampling=wire.Sampling(temperature=1.0, seed=7), max_tokens=50)

    alone = text_of(run(request()))
    s, engine = scheduler(n_slots=3)
    out = submit(s, engine, ask('!{"spread": 3.0}', sampling=wire.Sampling(seed=1), max_tokens=80))
    for _ in range(10):
        out += s.step()
    mine = request()
    out += submit(s, engine, mine)
    out += submit(s, engine, ask("beside"))
    assert text_of(finish(s, out), mine.id) == alone


PROMPTS = [
    "a",
    "hello there",
    "y" * 60,
    '!{"text": "ab", "nan_at": 1}',
    '!{"text": "ab", "fail_at": 0}',
    "z" * 9000,
]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.sampled_from(PROMPTS)),
            st.tuples(st.just("embed"), st.sampled_from(PROMPTS)),
            st.tuples(st.just("step"), st.integers(1, 12)),
            st.tuples(st.just("cancel"), st.integers(0, 30)),
        ),
        max_size=40,
    ),
    st.integers(1, 3),
)
def test_the_protocol_holds_for_any_requests(actions: list[tuple[str, Any]], n_slots: int) -> None:
    s, engine = scheduler(n_slots=n_slots, n_queue=3, n_ctx=256)
    asked: list[int] = []
    out: list[wire.ToServer] = []
    for action, value in actions:
        if action == "ask":
            request = ask(value, max_tokens=20)
            asked.append(request.id)
            out += [*s.submit(request), *start(s, engine)]
        elif action == "embed":
            body = wire.Embed(prompt=[wire.Special("bos"), wire.Text(value)])
            embed = wire.Request(id=next(IDS), body=body)
            asked.append(embed.id)
            out += [*s.submit(embed), *start(s, engine)]
        elif action == "step":
            for _ in range(value):
                out += s.step()
        elif asked:
            out += s.cancel(asked[value % len(asked)])
    everything(s, out)
    keeps_the_protocol(asked, out)


def keeps_the_protocol(asked: list[int], events: list[wire.ToServer]) -> None:
    """Checks the order: at most one Queued, one Accepted, results, and exactly one end, last."""
    seen: dict[int, list[str]] = {request_id: [] for request_id in asked}
    for event in events:
        assert isinstance(event, wire.Event)
        said = seen[event.id]
        name = type(event).__name__
        assert not {"Done", "Failed"} & set(said), "there was an event after the end"
        if name in ("Queued", "Accepted"):
            assert name not in said
        if isinstance(event, wire.AfterAccepted | wire.Done):
            assert "Accepted" in said
        if name == "Accepted":
            assert "Queued" in said
        if isinstance(event, wire.Content):
            assert f"ChoiceDone {event.choice}" not in said
        if isinstance(event, wire.ChoiceDone):
            name = f"ChoiceDone {event.choice}"
            assert name not in said
        said.append(name)
    for said in seen.values():
        assert said[-1] in ("Done", "Failed")
        if said[-1] == "Done":
            assert "Vector" in said or any(name.startswith("ChoiceDone") for name in said)


def test_the_scripted_engine_checks_rows_as_a_real_one_must() -> None:
    _, engine = scheduler()
    for row in (Row(0, [1], 5), Row(0, [], 0), Row(0, [1] * 9, 0)):
        with pytest.raises(EngineError):
            engine.eval([row])


# -- choices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", list(Copies))
def test_choices_share_one_request_and_its_prompt(copies: Copies) -> None:
    s, engine = scheduler(n_slots=3, copies=copies)
    events = finish(s, submit(s, engine, ask("a prompt of some length", n=5)))
    assert [text_of(events, choice=i) for i in range(5)] == ["a prompt of some length"] * 5
    assert sorted(e.choice for e in ends(events)) == [0, 1, 2, 3, 4]
    assert isinstance(last(events), wire.Done)
    copied = {e.choice for e in ends(events) if e.n_cached == last(events).n_prompt - 1}
    if copies is not Copies.NONE:
        assert copied == {1, 2, 3, 4}  # each choice evaluated one prompt token of its own


def test_choices_draw_from_seeds_of_their_own() -> None:
    sampling = wire.Sampling(temperature=1.0, seed=7)
    events = run(ask('!{"spread": 2.0}', sampling=sampling, n=3, max_tokens=30), n_slots=3)
    texts = [text_of(events, choice=i) for i in range(3)]
    assert len(set(texts)) == 3
    second = wire.Sampling(temperature=1.0, seed=8)
    assert text_of(run(ask('!{"spread": 2.0}', sampling=second, max_tokens=30))) == texts[1]


def test_a_fault_in_one_choice_fails_its_request_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    s, engine = scheduler(n_slots=3)
    broken, other = ask("broken", n=2), ask("other")
    out = [*submit(s, engine, broken), *submit(s, engine, other)]
    inner = GenerateTask.on_eval

    def on_eval(task: GenerateTask, *args: Any) -> list[wire.ToServer]:
        if task._id == broken.id and task._choice == 1 and not task.prefilling:
            raise RuntimeError("a fault")
        return inner(task, *args)

    monkeypatch.setattr(GenerateTask, "on_eval", on_eval)
    events = finish(s, out)
    failed = [e for e in events if isinstance(e, wire.Failed)]
    assert [(e.id, e.kind) for e in failed] == [(broken.id, "InternalError")]
    assert text_of(events, other.id) == "other"
    assert not any(isinstance(e, wire.Done) and e.id == broken.id for e in events)


def test_an_engine_error_fails_the_faulty_row_alone() -> None:
    s, engine = scheduler(n_slots=3)
    bad, good = ask('!{"text": "abcdef", "fail_at": 2}'), ask("a good and longer answer")
    events = finish(s, [*submit(s, engine, good), *submit(s, engine, bad)])
    assert [(e.id, e.kind) for e in events if isinstance(e, wire.Failed)] == [(bad.id, "ModelError")]
    assert text_of(events, good.id) == "a good and longer answer"


# -- deadlines and starts ------------------------------------------------------------------------------


def test_a_queued_request_fails_at_its_deadline() -> None:
    s, engine = scheduler(n_slots=1)
    clock: Clock = s._clock  # type: ignore[assignment]
    long, late = ask('!{"text": "x", "repeat": 300}'), ask("late", deadline=5.0)
    out = [*submit(s, engine, long), *s.step(), *submit(s, engine, late)]
    for _ in range(9):
        out += s.step()
    assert not s.idle
    clock.now = 5.0
    out += s.step()
    failed = last([e for e in out if e.id == late.id])  # type: ignore[union-attr]
    assert (failed.kind, failed.code) == ("RequestTimeout", "queue_timeout")
    assert failed.retry_after >= 1.0
    assert "in the queue" in failed.message
    finish(s, out)


def test_a_prefill_is_cut_at_its_deadline() -> None:
    s, engine = scheduler(n_ctx=4096)
    clock: Clock = s._clock  # type: ignore[assignment]
    request = ask("y" * 2000, deadline=50.0)
    out = submit(s, engine, request)
    for _ in range(5):
        out += s.step()
    clock.now = 50.0
    events = finish(s, out, steps=2)
    assert ends(events)[0].finish_reason == "length"
    assert ends(events)[0].n_generated == 0


def test_a_running_answer_is_cut_at_its_deadline() -> None:
    s, engine = scheduler(n_ctx=4096)
    clock: Clock = s._clock  # type: ignore[assignment]
    out = submit(s, engine, ask('!{"text": "x", "repeat": 3000}', deadline=50.0))
    while len(text_of(out)) < 3:
        out += s.step()
    clock.now = 50.0
    events = finish(s, out, steps=2)
    assert ends(events)[0].finish_reason == "length"
    assert len(text_of(events)) >= 3


def test_only_as_many_are_started_as_will_soon_have_a_slot() -> None:
    s, engine = scheduler(n_slots=2, n_queue=20)
    clock: Clock = s._clock  # type: ignore[assignment]
    for _ in range(2):
        submit(s, engine, ask('!{"text": "x", "repeat": 300}'))
        s.step()
    for _ in range(6):
        s.submit(ask("queued"))
    assert sum(isinstance(e, wire.Queued) for e in start(s, engine)) == 2
    clock.now += STARTED_BY_S  # their clients already know that the requests are valid
    assert sum(isinstance(e, wire.Queued) for e in start(s, engine)) == 4
    finish(s)


def test_clients_take_turns() -> None:
    s, engine = scheduler(n_slots=1, n_queue=20)
    out = submit(s, engine, ask("first", client="a"))
    asked = [ask(name, client=name[0]) for name in ("a1", "a2", "a3", "b1", "c1", "b2")]
    for request in asked:
        out += s.submit(request)
    events = finish(s, out)
    order = [e.id for e in events if isinstance(e, wire.Done)][1:]
    assert [asked[[r.id for r in asked].index(i)].client for i in order] == ["b", "c", "a", "b", "a", "a"]


# -- capabilities --------------------------------------------------------------------------------------


def test_a_full_kv_cache_drops_idle_prefixes_before_anything_fails() -> None:
    s, engine = scheduler(n_slots=3, n_kv=150, shares_cells=True)
    for name in ("a", "b"):
        finish(s, submit(s, engine, ask(name * 20)))
    events = finish(s, submit(s, engine, ask("c" * 40)))
    assert text_of(events) == "c" * 40


def counted(engine: FakeEngine) -> list[int]:
    """Counts the evals that find no room, from now on, in the list's only number."""
    n, plain = [0], engine.eval

    def counting(rows: Sequence[Row], until: float = 0.0) -> None:
        try:
            plain(rows, until)
        except NoRoom:
            n[0] += 1
            raise

    engine.eval = counting  # type: ignore[method-assign]
    return n


def test_a_request_waits_until_the_kv_cells_suffice() -> None:
    s, engine = scheduler(n_slots=2, n_kv=150, shares_cells=True)
    n_full = counted(engine)
    old, new = ask("o" * 40), ask("n" * 40)
    out = submit(s, engine, old)
    out += s.step()
    out = everything(s, [*out, *submit(s, engine, new)])
    assert (text_of(out, old.id), text_of(out, new.id)) == ("o" * 40, "n" * 40)
    ended = next(i for i, e in enumerate(out) if isinstance(e, wire.Done) and e.id == old.id)
    assert ended < next(i for i, e in enumerate(out) if isinstance(e, wire.Accepted) and e.id == new.id)
    assert n_full == [0]


def long(letter: str, **fields: Any) -> wire.Request:
    """Returns a request for an answer of 400 letters."""
    return ask(f'!{{"text": "{letter}", "repeat": 400}}', **fields)


def until_paused(
    s: Scheduler, engine: FakeEngine, old: wire.Request, new: wire.Request
) -> list[wire.ToServer]:
    """Runs two long answers until the newer one is paused, and returns the events."""
    out = submit(s, engine, old)
    for _ in range(20):
        out += s.step()
    out += submit(s, engine, new)
    while not s._room.paused:
        out += s.step()
    return out


def test_an_answer_without_cells_pauses_until_another_has_ended() -> None:
    s, engine = scheduler(n_slots=3, n_ctx=600, n_kv=800, shares_cells=True, saves=True)
    n_full = counted(engine)
    old, new, third = long("o"), long("n"), ask("t" * 20, max_tokens=20)
    out = until_paused(s, engine, old, new)
    out += submit(s, engine, third)
    n_before = len(text_of(out, new.id))
    assert 0 < n_before < 400
    out += s.step()
    assert len(text_of(out, new.id)) == n_before
    assert not any(isinstance(e, wire.Accepted) and e.id == third.id for e in out)
    out = everything(s, out)
    assert (text_of(out, old.id), text_of(out, new.id)) == ("o" * 400, "n" * 400)
    assert text_of(out, third.id) == "t" * 20
    assert n_full == [0]


def test_a_prompt_that_has_not_begun_can_pause() -> None:
    s, engine = scheduler(n_slots=3, n_ctx=600, n_kv=1500, saves=True, shares_cells=True)
    old, new = ask("o" * 40), ask("n" * 40)
    out = submit(s, engine, old)
    out += s.step()
    out += submit(s, engine, new)
    s._admit(out)
    assert s._running[-1].slot.tokens == []
    s._room.pause_newest()
    out = everything(s, out)
    assert (text_of(out, old.id), text_of(out, new.id)) == ("o" * 40, "n" * 40)


def test_a_conversation_that_is_gone_from_disk_is_computed_again() -> None:
    store = PrefixStore(1 << 20, goes_back=1)
    engine = FakeEngine(
        name="fake", n_slots=3, n_ctx=600, n_batch=8, saves=True, shares_cells=True, copies=Copies.PREFIX
    )
    s = Scheduler(engine, n_queue=8, clock=Clock(), store=store)
    request = ask("a" * 200)
    task = prepare(request, engine, RENDERER)
    assert isinstance(task, list)
    # two slots hold parts of other conversations; the most similar sequence is on disk only
    others = [submit(s, engine, ask("a" * 100)), submit(s, engine, ask("b" * 100))]
    everything(s, others[0] + others[1])
    entry = store.put(task[0].ids[:-1], "", (), b"[1]", 0)
    assert entry is not None
    entry.state = None
    out = everything(s, submit(s, engine, request))
    assert text_of(out, request.id) == "a" * 200
    assert entry not in store.entries


def test_an_engine_that_saves_nothing_fails_the_newest_answer() -> None:
    s, engine = scheduler(n_slots=3, n_ctx=600, n_kv=800, shares_cells=True)
    old, new = long("o"), long("n")
    out = submit(s, engine, old)
    for _ in range(20):
        out += s.step()
    out = everything(s, [*out, *submit(s, engine, new)])
    assert [(e.id, e.kind) for e in out if isinstance(e, wire.Failed)] == [(new.id, "Overloaded")]
    assert text_of(out, old.id) == "o" * 400


@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_a_paused_answer_can_end(end: str) -> None:
    s, engine = scheduler(n_slots=3, n_ctx=600, n_kv=800, shares_cells=True, saves=True)
    old, new = long("o"), long("n", deadline=None if end == "cancel" else 5.0)
    out = until_paused(s, engine, old, new)
    n_before = len(text_of(out, new.id))
    if end == "cancel":
        out += s.cancel(new.id)
        assert out[-1] == wire.Failed(id=new.id, kind="Cancelled", message="the client disconnected")
    else:
        s._clock.now = 5.0  # type: ignore[attr-defined]
        out += s.step()
        done = next(e for e in out if isinstance(e, wire.ChoiceDone))
        assert (done.id, done.finish_reason, len(text_of(out, new.id))) == (new.id, "length", n_before)
    assert not s._room.paused
    assert text_of(everything(s, out), old.id) == "o" * 400


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_answer_is_lost_while_the_cells_are_short(data: st.DataObject) -> None:
    draw = data.draw
    s, engine = scheduler(
        n_slots=4,
        n_ctx=300,
        n_kv=draw(st.integers(320, 700)),
        shares_cells=True,
        copies=Copies.PREFIX,
        saves=True,
        n_queue=50,
    )
    n_full = counted(engine)
    wanted: dict[int, str] = {}
    out: list[wire.ToServer] = []
    for _ in range(draw(st.integers(2, 8))):
        text = draw(st.sampled_from("abc")) * draw(st.integers(1, 120))
        request = ask(text, n=draw(st.integers(1, 3)), max_tokens=draw(st.sampled_from([None, 130])))
        wanted[request.id] = text
        out += submit(s, engine, request)
        for _ in range(draw(st.integers(0, 60))):
            out += s.step()
    out = everything(s, out)
    assert not [e for e in out if isinstance(e, wire.Failed)]
    texts: dict[tuple[int, int], str] = {}
    for e in out:
        if isinstance(e, wire.Content):
            texts[e.id, e.choice] = texts.get((e.id, e.choice), "") + e.text
    assert all(text == wanted[request] for (request, _), text in texts.items())
    assert {request for request, _ in texts} == set(wanted)
    assert n_full == [0]


def test_a_partial_eval_keeps_complete_rows_and_fails_the_others() -> None:
    s, engine = scheduler(n_slots=2)
    first, second = ask("first one"), ask("second one")
    out = [*submit(s, engine, first), *submit(s, engine, second)]
    while not (text_of(out, first.id) and text_of(out, second.id)):
        out += s.step()
    engine.partial = Partial([1, 0], "the evaluation was aborted")
    events = finish(s, out)
    failed = [e for e in events if isinstance(e, wire.Failed)]
    assert [(e.id, e.message) for e in failed] == [(second.id, "the evaluation was aborted")]
    assert text_of(events, first.id) == "first one"


@pytest.mark.parametrize(
    ("step_cost", "n_rows"), [({1: 5.0, 2: 12.0, 4: 30.0}, 1), ({1: 5.0, 2: 6.0, 4: 8.0}, 4), ({}, 4)]
)
def test_decodes_are_batched_where_that_is_faster(step_cost: dict[int, float], n_rows: int) -> None:
    s, engine = scheduler(n_slots=4, step_cost=step_cost, batches=True)
    out: list[wire.ToServer] = []
    for i in range(4):
        out += submit(s, engine, ask("abcd"[i] * 50))
    while any(r.task.prefilling for r in s._running) or len(s._running) < 4:
        out += s.step()
    sizes = Counter[int]()
    inner = engine.eval

    def counted(rows: Any) -> None:
        sizes[len(rows)] += 1
        inner(rows)

    engine.eval = counted  # type: ignore[method-assign]
    for _ in range(20):
        out += s.step()
    assert set(sizes) == {n_rows}
    progress = [len(text_of(out, e.id)) for e in out if isinstance(e, wire.Accepted)]
    assert max(progress) - min(progress) <= 20 // 4 + 8  # no sequence starves
    finish(s, out)


def test_a_text_that_needs_one_row_gets_one() -> None:
    events = run(ask("one row"), n_batch=64, whole_rows=True)
    assert text_of(events) == "one row"


def test_a_step_never_holds_more_tokens_than_the_batch() -> None:
    s, engine = scheduler(n_slots=4, n_batch=8)
    engine.caps = type(engine.caps)(
        **{**{f: getattr(engine.caps, f) for f in engine.caps.__struct_fields__}, "n_batch": 10}
    )
    s = Scheduler(engine, n_queue=8, clock=Clock())
    out: list[wire.ToServer] = []
    asked = [ask(letter * 60) for letter in "abcd"]
    for request in asked:
        out += submit(s, engine, request)
    events = finish(s, out)  # the scripted engine raises for larger batches
    assert [text_of(events, r.id) for r in asked] == [letter * 60 for letter in "abcd"]


def test_choices_that_time_out_in_the_queue_block_no_other_request() -> None:
    s, engine = scheduler(n_slots=1)
    clock: Clock = s._clock  # type: ignore[assignment]
    long = ask('!{"text": "x", "repeat": 300}', n=2)
    out = [*submit(s, engine, long), *s.step()]
    clock.now += 1001.0  # the second choice times out
    out += s.step()
    assert [(e.choice, e.finish_reason) for e in ends(out)] == [(1, "length")]
    s.submit(ask("next"))
    assert any(isinstance(e, wire.Queued) for e in start(s, engine))
    events = finish(s, out)
    assert text_of(events, long.id) == "x" * 300


# -- interrupts ------------------------------------------------------------------------------------


def slow_scheduler(monkeypatch: pytest.MonkeyPatch, token_ms: float) -> tuple[Scheduler, FakeEngine]:
    """Returns a scheduler on the real clock, and an engine that takes `token_ms` for each token."""
    monkeypatch.setenv("TINYOAI_FAKE_TOKEN_MS", str(token_ms))
    engine = FakeEngine(name="fake", n_ctx=512, n_batch=64, interrupts=True)
    return Scheduler(engine, n_queue=8, clock=time.monotonic, queue_timeout_s=1000.0), engine


def begin_step(s: Scheduler, engine: FakeEngine) -> tuple[threading.Thread, list[wire.ToServer]]:
    """Steps in another thread, and returns once the engine evaluates; the list gets the messages."""
    out: list[wire.ToServer] = []
    n_before = engine.n_evals
    thread = threading.Thread(target=lambda: out.extend(s.step()), daemon=True)
    thread.start()
    while engine.n_evals == n_before:
        time.sleep(0.001)
    time.sleep(0.02)  # inside the engine's wait
    return thread, out


def test_a_cancel_ends_a_prefill_step_early(monkeypatch: pytest.MonkeyPatch) -> None:
    s, engine = slow_scheduler(monkeypatch, 1000.0)
    request = ask("a" * 30, prompt=[wire.Text("a" * 30)])
    s.submit(request)
    start(s, engine)
    thread, out = begin_step(s, engine)
    s.interrupt(request.id + 1)
    thread.join(0.1)
    assert thread.is_alive()  # another request's cancel is no reason
    s.interrupt(request.id)
    thread.join(10)
    assert not thread.is_alive()
    assert [type(m) for m in out] == [wire.Accepted]
    assert s.cancel(request.id)[0] == wire.Failed(
        id=request.id, kind="Cancelled", message="the client disconnected"
    )


def test_a_deadline_ends_a_prefill_step_early(monkeypatch: pytest.MonkeyPatch) -> None:
    s, engine = slow_scheduler(monkeypatch, 1000.0)
    begin = time.monotonic()
    request = ask("", prompt=[wire.Text("a" * 30)], deadline=begin + 0.3)
    s.submit(request)
    start(s, engine)
    out = s.step()
    assert [type(m) for m in out] == [wire.Accepted, wire.ChoiceDone, wire.Done]
    assert isinstance(out[1], wire.ChoiceDone)
    assert (out[1].finish_reason, out[1].n_generated) == ("length", 0)
    assert s.idle


def test_an_interrupted_step_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    s, engine = slow_scheduler(monkeypatch, 5.0)
    kept, left = (ask("", prompt=[wire.Text(text * 40)], max_tokens=3) for text in "ab")
    for request in (kept, left):
        s.submit(request)
    start(s, engine)
    thread, out = begin_step(s, engine)
    s.interrupt(left.id)
    thread.join(10)
    out += s.cancel(left.id)
    while not s.idle:
        out += s.step()
    ends = [m for m in out if isinstance(m, wire.Done | wire.Failed)]
    assert {m.id: type(m) for m in ends} == {kept.id: wire.Done, left.id: wire.Failed}
    assert sum(isinstance(m, wire.ChoiceDone) and m.n_generated == 3 for m in out) == 1


# -- limits of a step ------------------------------------------------------------------------------


def test_the_outputs_of_a_step_stay_within_the_limit() -> None:
    s, engine = scheduler(n_slots=4, n_batch=16, n_outputs=8, n_outputs_total=8)
    sizes: list[int] = []
    evaluate = engine.eval

    def watched(rows: list[Row], until: float = 0.0) -> None:
        sizes.append(sum(1 if row.want is Want.LAST else len(row.tokens) for row in rows if row.want.value))
        evaluate(rows, until)

    engine.eval = watched  # type: ignore[method-assign, assignment]
    requests = [
        wire.Request(id=next(IDS), body=wire.Embed(prompt=[wire.Text("abcdefghij")])) for _ in range(4)
    ]
    requests.append(ask("hello"))
    out = run_all(s, engine, requests)
    assert sum(isinstance(m, wire.Vector) for m in out) == 4
    assert sum(isinstance(m, wire.Done) for m in out) == 5
    assert max(sizes) == 8


def test_whole_rows_that_do_not_fit_together_take_turns() -> None:
    s, engine = scheduler(n_slots=4, n_ctx=64, n_batch=64, whole_rows=True, n_outputs=64)
    engine.caps = structs.replace(engine.caps, n_batch=64)
    s = Scheduler(engine, n_queue=8, clock=Clock(), queue_timeout_s=1000.0)
    requests = [
        wire.Request(id=next(IDS), body=wire.Embed(prompt=[wire.Text("x" * n)])) for n in (40, 40, 20, 60)
    ]
    out = run_all(s, engine, requests)
    assert [type(m) for m in out if isinstance(m, wire.Vector | wire.Failed)] == [wire.Vector] * 4


def run_all(s: Scheduler, engine: FakeEngine, requests: list[wire.Request]) -> list[wire.ToServer]:
    """Submits requests and steps until all have ended; returns all messages."""
    out: list[wire.ToServer] = []
    for request in requests:
        out += s.submit(request)
    while not s.idle:
        out += start(s, engine)
        out += s.step()
    return out


@pytest.mark.parametrize(("interrupts", "n_first"), [(True, 64), (False, 16)])
def test_a_prompt_alone_takes_whole_steps_if_they_can_be_interrupted(interrupts: bool, n_first: int) -> None:
    s, engine = scheduler(n_batch=64, n_chunk=64, align=64, step_cost={1: 20.0}, interrupts=interrupts)
    sizes: list[int] = []
    evaluate = engine.eval

    def watched(rows: list[Row], until: float = 0.0) -> None:
        sizes.append(len(rows[0].tokens))
        evaluate(rows, until)

    engine.eval = watched  # type: ignore[method-assign, assignment]
    run_all(s, engine, [ask("", prompt=[wire.Text("a" * 200)], max_tokens=1)])
    assert sizes[0] == n_first


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_a_slow_machine_gets_whole_blocks_where_less_would_change_results(n_prompts: int) -> None:
    s, engine = scheduler(4, n_batch=68, n_chunk=64, align=64, n_least=64, step_cost={1: 200.0})
    ends: set[int] = set()
    evaluate = engine.eval

    def watched(rows: list[Row], until: float = 0.0) -> None:
        ends.update(row.pos + len(row.tokens) for row in rows if row.pos < 201)
        evaluate(rows, until)

    engine.eval = watched  # type: ignore[method-assign, assignment]
    run_all(s, engine, [ask("", prompt=[wire.Text(c * 200)], max_tokens=1) for c in "abc"[:n_prompts]])
    assert {end for end in ends if end % 64} <= {200, 201}


def test_an_interrupt_during_a_second_try_fails_one_request_alone() -> None:
    s, engine = scheduler(n_batch=64, interrupts=True)
    evaluate, n_calls = engine.eval, 0

    def faulty(rows: list[Row], until: float = 0.0) -> None:
        nonlocal n_calls
        n_calls += 1
        if len(rows) == 2:
            raise EngineError("both")
        if n_calls == 2:
            raise Interrupted
        evaluate(rows, until)

    engine.eval = faulty  # type: ignore[method-assign, assignment]
    out = run_all(s, engine, [ask("", prompt=[wire.Text(c * 9)], max_tokens=1) for c in "ab"])
    assert sorted(type(m).__name__ for m in out if isinstance(m, wire.Done | wire.Failed)) == [
        "Done",
        "Failed",
    ]
