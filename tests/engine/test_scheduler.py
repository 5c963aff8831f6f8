"""The scheduler over the scripted engine: the law of the wire, reuse, fairness, every way to end."""

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyoai import wire
from tinyoai.engine.contract import EngineError
from tinyoai.engine.fake import FakeEngine
from tinyoai.engine.scheduler import Job, Scheduler, prepare

IDS = itertools.count(1)


def chat(text: str) -> list[wire.Segment]:
    """A prompt as the ChatML template makes it."""
    return [
        wire.Special("bos"),
        wire.Special("<|im_start|>"),
        wire.Text("user\n" + text),
        wire.Special("<|im_end|>"),
        wire.Text("\n"),
        wire.Special("<|im_start|>"),
        wire.Text("assistant\n"),
    ]


def ask(text: str, **fields: Any) -> wire.Generate:
    """A Generate with a new id."""
    fields.setdefault("sampling", wire.Sampling(temperature=0.0))
    fields.setdefault("prompt", chat(text))
    return wire.Generate(id=next(IDS), **fields)


class Clock:
    """Time that passes by one millisecond whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def scheduler(
    n_slots: int = 2, n_queue: int = 8, n_ctx: int = 512, n_batch: int = 8
) -> tuple[Scheduler, FakeEngine]:
    """A scheduler and its engine."""
    engine = FakeEngine(name="fake", n_slots=n_slots, n_ctx=n_ctx, n_batch=n_batch)
    return Scheduler(engine, n_threads=1, n_queue=n_queue, clock=Clock()), engine


def submit(s: Scheduler, engine: FakeEngine, request: wire.Generate | wire.Embed) -> list[wire.ToServer]:
    """Prepares and queues."""
    job = prepare(request, engine)
    return s.submit(job) if isinstance(job, Job) else [job]


def finish(s: Scheduler, out: list[wire.ToServer] | None = None, steps: int = 20_000) -> list[wire.ToServer]:
    """Steps until idle; all that was said."""
    out = out if out is not None else []
    for _ in range(steps):
        if s.idle:
            return out
        out += s.step()
    raise AssertionError("the scheduler never came to rest")


def run(request: wire.Generate, **kwargs: Any) -> list[wire.ToServer]:
    """One request alone."""
    s, engine = scheduler(**kwargs)
    return finish(s, submit(s, engine, request))


def text_of(events: list[wire.ToServer], request_id: int | None = None) -> str:
    """All text of one request."""
    return "".join(
        e.text for e in events if isinstance(e, wire.Delta) and (request_id is None or e.id == request_id)
    )


def last(events: list[wire.ToServer]) -> Any:
    """The event that ended it."""
    return events[-1]


def test_a_reply_comes_whole_and_ends() -> None:
    events = run(ask("héllo \N{GRINNING FACE}"))
    assert isinstance(events[0], wire.Accepted)
    assert text_of(events) == "héllo \N{GRINNING FACE}"
    assert last(events).finish_reason == "stop"
    assert last(events).n_generated == len("héllo \N{GRINNING FACE}".encode()) + 1


def test_no_delta_splits_a_code_point() -> None:
    events = run(ask("a\N{GRINNING FACE}b"))
    assert [e.text for e in events if isinstance(e, wire.Delta)] == ["a", "\N{GRINNING FACE}", "b"]


@pytest.mark.parametrize(
    ("limit", "reason", "text"), [(3, "length", "abc"), (6, "length", "abcdef"), (7, "stop", "abcdef")]
)
def test_max_tokens(limit: int, reason: str, text: str) -> None:
    events = run(ask("abcdef", max_tokens=limit))
    assert (text_of(events), last(events).finish_reason) == (text, reason)


def test_max_tokens_cuts_a_code_point_into_a_replacement_character() -> None:
    assert text_of(run(ask("a\N{GRINNING FACE}", max_tokens=3))) == "a\N{REPLACEMENT CHARACTER}"


def test_the_end_of_the_context_is_a_length_finish() -> None:
    request = ask('!{"text": "x", "repeat": 1000}')
    events = run(request, n_ctx=128)
    n_prompt = next(e.n_prompt for e in events if isinstance(e, wire.Accepted))
    assert last(events).finish_reason == "length"
    assert last(events).n_generated == 128 - n_prompt


@pytest.mark.parametrize("n_ctx", [50, 49, 20])
def test_a_prompt_that_fills_the_context_is_refused_with_both_counts(n_ctx: int) -> None:
    request = ask("x" * 30)
    n_prompt = 1 + 1 + len("user\n") + 30 + 1 + 1 + 1 + len("assistant\n")
    events = run(request, n_ctx=min(n_ctx, n_prompt))
    assert last(events).kind == "ContextLengthExceeded"
    assert str(min(n_ctx, n_prompt)) in last(events).message
    assert last(events).param == "messages"


def test_a_stop_sequence_ends_it_and_never_shows() -> None:
    events = run(ask("one two three", stop=["two"]))
    assert text_of(events) == "one "
    assert last(events).finish_reason == "stop"


def test_what_only_began_like_a_stop_sequence_comes_out() -> None:
    assert text_of(run(ask("one tw", stop=["two"]))) == "one tw"


def test_ignore_eos_goes_on_to_the_limit() -> None:
    events = run(ask("ab", ignore_eos=True, max_tokens=40))
    assert last(events).finish_reason == "length"
    assert last(events).n_generated == 40


def test_min_tokens_holds_the_end_off() -> None:
    events = run(ask("ab", min_tokens=10))
    assert last(events).n_generated >= 10


def test_logprobs_go_with_their_text() -> None:
    events = run(ask("abc", logprobs=2, stop=["zz"]))
    deltas = [e for e in events if isinstance(e, wire.Delta)]
    entries = [entry for e in deltas for entry in e.logprobs]
    assert b"".join(entry.piece for entry in entries).decode() == text_of(events) == "abc"
    assert all(entry.logprob is not None and entry.logprob > -1e-3 for entry in entries)
    assert all(len(entry.top) == 2 and entry.top[0][0] == entry.piece for entry in entries)


def test_logprobs_of_a_stopped_answer_end_before_the_stop() -> None:
    events = run(ask("one two", logprobs=0, stop=[" two"]))
    entries = [entry for e in events if isinstance(e, wire.Delta) for entry in e.logprobs]
    assert b"".join(entry.piece for entry in entries) == b"one"


def test_echo_with_logprobs_scores_the_prompt() -> None:
    request = ask("", prompt=[wire.Special("bos"), wire.Text("abcd")], echo=True, logprobs=1, max_tokens=2)
    events = run(request)
    assert text_of(events) == "abcdef"
    entries = [entry for e in events if isinstance(e, wire.Delta) for entry in e.logprobs]
    assert [entry.piece for entry in entries] == [b"a", b"b", b"c", b"d", b"e", b"f"]
    assert entries[0].logprob is None
    # the fake engine goes on with the alphabet, so b after a is nearly certain
    assert all(entry.logprob is not None and entry.logprob > -1e-3 for entry in entries[1:])


def test_echo_without_anything_to_generate() -> None:
    events = run(ask("", prompt=[wire.Ids([97, 98])], echo=True, max_tokens=0))
    assert text_of(events) == "ab"
    assert (last(events).finish_reason, last(events).n_generated) == ("length", 0)


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
def test_refused_before_it_is_accepted(request_: wire.Generate, kind: str, param: str) -> None:
    events = run(request_)
    assert [type(e) for e in events] == [wire.Failed]
    assert (last(events).kind, last(events).param) == (kind, param)


def test_every_token_forbidden_is_the_clients_mistake() -> None:
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


def test_an_engine_that_raises_ends_what_ran_and_serves_the_next() -> None:
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


def test_a_full_queue_says_so() -> None:
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
    while not any(isinstance(e, wire.Delta) and e.id == reader.id for e in out):
        out += s.step()
    spoken = len(text_of(out, talker.id))
    n_chunks = 400 // engine.n_batch
    # at least one token for each chunk, and the prefill is not starved either
    assert n_chunks <= spoken < 600
    finish(s, out)


def test_sampled_text_is_the_same_whatever_runs_beside() -> None:
    def request() -> wire.Generate:
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
def test_the_law_of_the_wire(actions: list[tuple[str, Any]], n_slots: int) -> None:
    s, engine = scheduler(n_slots=n_slots, n_queue=3, n_ctx=256)
    asked: list[int] = []
    out: list[wire.ToServer] = []
    for action, value in actions:
        if action == "ask":
            request = ask(value, max_tokens=20)
            asked.append(request.id)
            out += submit(s, engine, request)
        elif action == "embed":
            embed = wire.Embed(id=next(IDS), prompt=[wire.Special("bos"), wire.Text(value)])
            asked.append(embed.id)
            out += submit(s, engine, embed)
        elif action == "step":
            for _ in range(value):
                out += s.step()
        elif asked:
            out += s.cancel(asked[value % len(asked)])
    finish(s, out)
    obeys_the_law(asked, out)


def obeys_the_law(asked: list[int], events: list[wire.ToServer]) -> None:
    """At most one Accepted, Deltas or one Vector only after it, and exactly one end, last."""
    ended: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    vectors: Counter[int] = Counter()
    texts: Counter[int] = Counter()
    for event in events:
        assert isinstance(event, wire.Event)
        assert not ended[event.id], "something was said after the end"
        if isinstance(event, wire.Accepted):
            accepted[event.id] += 1
        elif isinstance(event, wire.Delta | wire.Vector):
            assert accepted[event.id] == 1
            (vectors if isinstance(event, wire.Vector) else texts)[event.id] += 1
        else:
            if isinstance(event, wire.Done):
                assert accepted[event.id] == 1
                assert event.n_generated or vectors[event.id]
            ended[event.id] += 1
    assert all(count <= 1 for count in accepted.values())
    assert all(count == 1 for count in vectors.values())
    assert not set(vectors) & set(texts)
    assert ended == Counter(asked)


def test_the_fake_engine_checks_positions_as_a_real_one_must() -> None:
    _, engine = scheduler()
    from tinyoai.engine.contract import Row

    with pytest.raises(EngineError):
        engine.eval([Row(0, [1], 5)], 1)
    with pytest.raises(EngineError):
        engine.eval([Row(0, [], 0)], 1)
