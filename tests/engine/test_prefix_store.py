"""The store of finished sequences in memory, and its use by the scheduler over the scripted engine."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine import test_scheduler as scripted
from tinyoai import wire
from tinyoai.engine.contract import Adapter, Copies, Truncates
from tinyoai.engine.fake import FakeEngine
from tinyoai.engine.prefix_store import CHECKPOINTS, MIN_TOKENS, PrefixStore
from tinyoai.engine.scheduler import Scheduler

NONE: tuple[Adapter, ...] = ()


class Clock:
    """A clock that advances by one second at each reading."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def made(limit: int = 1 << 20, **fields: Any) -> PrefixStore:
    return PrefixStore(limit, now=Clock(), **fields)


def ids(first: int, n: int = 100) -> list[int]:
    return list(range(first, first + n))


def find(store: PrefixStore, prompt: list[int], scope: str = "", adapters: tuple[Adapter, ...] = NONE) -> Any:
    """Returns the state and the usable length of the best entry for a prompt."""
    entry, n, _ = store.find(prompt, scope, adapters, len(prompt) - 1)
    return (entry.state if entry is not None else None), n


# -- the store ---------------------------------------------------------------------------------------


def test_the_longest_common_prefix_is_found() -> None:
    store = made()
    store.put(ids(0), "", NONE, b"a")
    store.put([*ids(0, 50), *ids(500, 50)], "", NONE, b"b")
    assert find(store, [*ids(0, 80), 7]) == (b"a", 80)
    assert find(store, [*ids(0, 50), *ids(500, 20), 7]) == (b"b", 70)
    assert find(store, [9, 9]) == (None, 0)
    assert store.find([*ids(0, 50), 1, 1], "", NONE, 10)[1:] == (10, 50)


def test_scopes_and_adapters_never_meet() -> None:
    store = made()
    lora = (Adapter("a", 0.5),)
    store.put(ids(0), "x", lora, b"a")
    prompt = [*ids(0), 1]
    assert find(store, prompt, "x", lora) == (b"a", 100)
    for scope, adapters in (("", lora), ("y", lora), ("x", NONE), ("x", (Adapter("a", 0.6),))):
        assert store.find(prompt, scope, adapters, 100) == (None, 0, 0)
        assert store.wants(ids(0), scope, adapters)


def test_an_entry_that_another_contains_is_dropped_or_not_taken() -> None:
    store = made()
    store.put(ids(0, 70), "", NONE, b"short")
    store.put(ids(0, 70), "other", NONE, b"elsewhere")
    store.put(ids(0, 90), "", NONE, b"long")
    assert sorted(e.state for e in store.entries) == [b"elsewhere", b"long"]
    assert not store.wants(ids(0, 80), "", NONE)
    assert store.wants(ids(0, 91), "", NONE)
    assert not store.wants(ids(0, MIN_TOKENS - 1), "new", NONE)
    assert store.used == len(b"longelsewhere")


def test_the_least_recently_used_states_go_first() -> None:
    store = made(limit=250)
    for i in range(3):
        store.put(ids(1000 * i), "", NONE, bytes(100))
    assert [e.tokens[0] for e in store.entries] == [1000, 2000]
    entry, _, _ = store.find([*ids(1000), 1], "", NONE, 100)
    assert entry is not None
    store.touch(entry)
    store.put(ids(3000), "", NONE, bytes(100))
    assert [e.tokens[0] for e in store.entries] == [1000, 3000]
    assert store.used == 200


def test_a_state_over_the_limit_is_not_kept_and_not_asked_for_again() -> None:
    store = made(limit=250)
    assert store.put(ids(0), "", NONE, bytes(300)) is None
    assert (store.entries, store.used) == ([], 0)
    assert not store.wants(ids(0), "", NONE)
    assert not made(limit=0).wants(ids(0), "", NONE)


def test_without_a_way_back_only_whole_entries_serve_and_few_of_a_conversation_stay() -> None:
    store = made(goes_back=False)
    for n in (70, 80, 90, 100, 110):
        store.put(ids(0, n), "", NONE, str(n).encode())
    assert sorted(len(e.tokens) for e in store.entries) == [90, 100, 110]
    assert len(store.entries) == CHECKPOINTS
    assert find(store, [*ids(0, 105), 7]) == (b"100", 100)
    assert find(store, [*ids(0, 89), 7]) == (None, 0)
    assert find(store, ids(0, 100)) == (b"90", 90)  # the last token is always evaluated


SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=80).map(lambda rest: [0] * 64 + rest)


@given(st.lists(st.tuples(SEQUENCES, st.sampled_from("ab"), st.integers(0, 60)), max_size=12), SEQUENCES)
def test_the_store_is_no_worse_than_a_plain_search(
    puts: list[tuple[list[int], str, int]], prompt: list[int]
) -> None:
    store = made(limit=10_000)
    for tokens, scope, size in puts:
        if store.wants(tokens, scope, NONE):
            store.put(tokens, scope, NONE, bytes(size))
    assert store.used == sum(len(e.state or b"") for e in store.entries) <= 10_000
    for scope in "ab":
        best = 0
        for tokens, of, _ in puts:
            n = 0
            while of == scope and n < min(len(tokens), len(prompt) - 1) and tokens[n] == prompt[n]:
                n += 1
            best = max(best, n)
        assert store.find(prompt, scope, NONE, len(prompt) - 1)[1] == best
        for a in store.entries:
            assert not any(b is not a and b.starts(a) for b in store.entries)


# -- with the scheduler --------------------------------------------------------------------------------


def scheduler(n_slots: int = 4, limit: int = 1 << 24, **caps: Any) -> tuple[Scheduler, FakeEngine]:
    """Returns a scheduler with a store over the scripted engine."""
    caps = {"saves": True, "copies": Copies.PREFIX, **caps}
    engine = FakeEngine(name="fake", n_slots=n_slots, n_ctx=2048, n_batch=64, **caps)
    store = PrefixStore(limit, goes_back=engine.caps.truncates is not Truncates.NEVER)
    return Scheduler(engine, n_queue=16, clock=scripted.Clock(), store=store), engine


def talk(
    s: Scheduler, engine: FakeEngine, messages: list[tuple[str, str]], *, scope: str = "", **fields: Any
) -> tuple[str, Any, list[Any]]:
    """Runs a conversation. Returns the answer, its Accepted and the ChoiceDones."""
    prompt = wire.Conversation(messages=[wire.Message(role=role, content=text) for role, text in messages])
    request = scripted.ask("", prompt=prompt, **fields)
    request = wire.Request(id=request.id, body=request.body, scope=scope)
    events = scripted.finish(s, scripted.submit(s, engine, request))
    assert not [e for e in events if isinstance(e, wire.Failed)]
    (accepted,) = [e for e in events if isinstance(e, wire.Accepted)]
    return scripted.text_of(events), accepted, scripted.ends(events)


SYSTEM = ("system", "You are short. " * 20)


@pytest.mark.parametrize("copies", list(Copies))
@pytest.mark.parametrize("truncates", list(Truncates))
def test_ten_conversations_that_alternate_on_four_slots_reuse_their_histories(
    copies: Copies, truncates: Truncates
) -> None:
    s, engine = scheduler(copies=copies, truncates=truncates)
    history = {i: [SYSTEM, ("user", f"{i} is my number, says he. " * 8)] for i in range(10)}
    for turn in range(3):
        for i, messages in history.items():
            n_known = sum(len(text) for _, text in messages[:-1]) if turn else 0
            answer, accepted, _ = talk(s, engine, messages)
            assert answer == messages[-1][1]  # the engine's answer depends on what the sequence really holds
            assert accepted.n_cached >= n_known, (turn, i)
            messages += [("assistant", answer), ("user", f"{turn} and {i} go on")]


def test_a_conversation_of_another_scope_is_neither_reused_nor_seen() -> None:
    s, engine = scheduler(n_slots=1)
    messages = [("user", "x" * 200)]
    for scope, n_cached in (("a", 0), ("b", 0), ("a", 200), ("b", 200), ("", 0)):
        _, accepted, (end,) = talk(s, engine, messages, scope=scope)
        assert accepted.n_cached >= n_cached
        if not n_cached:
            assert (accepted.n_cached, accepted.cache_miss, end.cache_miss) == (0, -1, -1)


@pytest.mark.parametrize("copies", list(Copies))
def test_slots_of_another_scope_are_not_copied(copies: Copies) -> None:
    s, engine = scheduler(copies=copies)
    talk(s, engine, [("user", "x" * 200)], scope="a")
    assert talk(s, engine, [("user", "x" * 200)], scope="b")[1].n_cached == 0
    assert talk(s, engine, [("user", "x" * 200)], scope="a")[1].n_cached > 200


def test_a_miss_tells_where_the_prompt_departs() -> None:
    s, engine = scheduler(n_slots=1)
    talk(s, engine, [("user", "a" * 100 + "b" * 100)])
    _, accepted, (end,) = talk(s, engine, [("user", "a" * 100 + "c" * 100)])
    at = len("<user\n") + 100  # BOS, the marker and the role come before the text
    assert abs(accepted.cache_miss - at) <= 2
    assert end.cache_miss == accepted.cache_miss == accepted.n_cached


@pytest.mark.parametrize("copies", list(Copies))
@pytest.mark.parametrize("truncates", [Truncates.FREELY, Truncates.NEVER])
def test_several_choices_prefill_once(copies: Copies, truncates: Truncates) -> None:
    s, engine = scheduler(copies=copies, truncates=truncates)
    _, _, ends = talk(s, engine, [("user", "x" * 300)], n=3, max_tokens=5)
    n_cached = sorted(end.n_cached for end in ends)
    assert n_cached[0] == 0
    if copies is not Copies.NONE:  # else they start side by side
        assert n_cached[1] > 280


def test_a_model_that_cannot_go_back_resumes_at_the_last_message() -> None:
    s, engine = scheduler(n_slots=1, truncates=Truncates.NEVER, copies=Copies.WHOLE)
    first = [("user", "a" * 150)]
    answer, _, _ = talk(s, engine, first)
    again, accepted, _ = talk(s, engine, first)
    assert again == answer
    assert accepted.n_cached > 150  # of the same question
    longer = [*first, ("assistant", answer), ("user", "b" * 90)]
    assert talk(s, engine, longer)[1].n_cached > 300
    edited = [*longer[:-1], ("user", "c" * 90)]
    text, accepted, _ = talk(s, engine, edited)
    assert text == "c" * 90
    assert accepted.n_cached > 300
    store = s.prefixes._store
    assert store is not None
    assert 0 < store.used <= 1 << 24


def test_a_state_that_does_not_load_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    s, engine = scheduler(n_slots=1)
    talk(s, engine, [("user", "x" * 200)])
    talk(s, engine, [("user", "y" * 200)])
    refused = []

    def load(seq: int, state: bytes) -> bool:
        refused.append(state)
        engine.truncate(seq, 0)
        return False

    monkeypatch.setattr(engine, "load", load)
    answer, accepted, _ = talk(s, engine, [("user", "x" * 200)])
    assert (answer, accepted.n_cached, len(refused)) == ("x" * 200, 0, 1)


def test_a_store_smaller_than_a_conversation_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    s, engine = scheduler(n_slots=1, limit=100)
    for letter in "abcd":
        answer, accepted, _ = talk(s, engine, [("user", letter * 200)])
        assert (answer, accepted.n_cached > 200) == (letter * 200, False)
    (line,) = capsys.readouterr().err.splitlines()
    assert "--cache-ram" in line


def test_what_is_evicted_for_want_of_cells_goes_to_the_store() -> None:
    s, engine = scheduler(n_kv=2048)
    for letter in "abcdefgh":
        talk(s, engine, [("user", letter * 400)])
    for letter in "abcdefgh":
        answer, accepted, _ = talk(s, engine, [("user", letter * 400)])
        assert answer == letter * 400
        assert accepted.n_cached > 400, letter


def test_a_full_cache_that_cannot_take_a_long_state_computes_it_again() -> None:
    s, engine = scheduler(n_slots=2, n_kv=1300)
    talk(s, engine, [("user", "x" * 500)])
    talk(s, engine, [("user", "y" * 500)])
    long = scripted.ask("z" * 300, max_tokens=200)
    out = scripted.submit(s, engine, long)
    for _ in range(30):
        out += s.step()
    short = scripted.ask("x" * 400, max_tokens=2)
    scripted.submit(s, engine, short)
    events = scripted.finish(s, out)
    assert scripted.text_of(events, short.id) == "xx"
    assert not [e for e in events if isinstance(e, wire.Failed)]
