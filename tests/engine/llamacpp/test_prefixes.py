"""Reuse of prefixes over the real library: restored and forked sequences answer as freshly computed ones."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import architectures, fixtures, llama_server
from tinyoai import wire
from tinyoai.engine.contract import Truncates
from tinyoai.engine.llamacpp.engine import LlamaCppEngine
from tinyoai.engine.llamacpp.opening import open_engine
from tinyoai.engine.prefix_store import PrefixStore
from tinyoai.engine.rendering import ChatRenderer
from tinyoai.engine.requests import prepare
from tinyoai.engine.scheduler import Scheduler

IDS = itertools.count(1)
RAM = 64 << 20


@pytest.fixture(autouse=True)
def library() -> None:
    """Without the library the tests are skipped, or fail with CI=true."""
    if not llama_server.installed():
        fixtures.absent("xllamacpp is not installed: run `make test`")


class Model:
    """A loaded model behind a scheduler."""

    def __init__(self, path: Path, *, ram: int = RAM, **fields: Any) -> None:
        options: dict[str, Any] = {"n_ctx": 1024, "n_slots": 2, "n_batch": 64, "n_threads": 1} | fields
        load = wire.Load(path=str(path), name="m", engine="llamacpp", **options)
        self.engine: LlamaCppEngine = open_engine(load)
        self._renderer = ChatRenderer(load, self.engine)
        store = PrefixStore(ram, goes_back=self.engine.caps.cuts_states)
        self.scheduler = Scheduler(self.engine, n_queue=16, clock=time.monotonic, store=store)

    def ask(self, messages: list[tuple[str, str]], **fields: Any) -> tuple[list[str], list[wire.ChoiceDone]]:
        """Returns the answers to a conversation, and how each choice ended."""
        prompt = wire.Conversation(messages=[wire.Message(role=r, content=c) for r, c in messages])
        fields = {"max_tokens": 6, "sampling": wire.Sampling(temperature=0.0), "ignore_eos": True} | fields
        body = wire.Generate(prompt=prompt, **fields)
        scheduler = self.scheduler
        out = scheduler.submit(wire.Request(id=next(IDS), body=body))
        while not scheduler.idle:
            while (queued := scheduler.next_to_prepare()) is not None:
                out += scheduler.prepared(queued.id, prepare(queued.request, self.engine, self._renderer))
            out += scheduler.step()
        assert not [e for e in out if isinstance(e, wire.Failed)]
        texts = [""] * body.n
        for event in out:
            if isinstance(event, wire.Content):
                texts[event.choice] += event.text
        return texts, sorted((e for e in out if isinstance(e, wire.ChoiceDone)), key=lambda e: e.choice)


KINDS = [
    ("llama", "unified"),
    ("llama", "separate"),
    ("gemma3", "unified"),
    ("gemma3", "separate"),
    ("falcon-h1", "unified"),
]
"""Plain attention with shared cells and with streams, a sliding window, and a hybrid with recurrent layers."""


@pytest.fixture(params=KINDS, ids=" ".join)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    """A small model of each kind."""
    name, kv = request.param
    made = Model(architectures.model(name), kv=kv)
    yield made
    made.engine.close()


def story(i: int) -> str:
    return f"Story {i}: " + f"the keeper of house {i} counts ship {i} and ship {i + 1}. " * 8


def test_conversations_that_take_turns_reuse_their_histories(model: Model) -> None:
    system = ("system", "Answer in a few words, and stay with the facts of the story. " * 4)
    history = {i: [system, ("user", story(i))] for i in range(5)}
    n_prompt = 0
    for turn in range(3):
        for i, messages in history.items():
            (answer,), (end,) = model.ask(messages)
            if turn:
                assert end.n_cached > n_prompt - 60, (turn, i)
            messages += [("assistant", answer), ("user", "Go on.")]
        n_prompt = end.n_cached + 40


def test_a_restored_conversation_goes_on_as_an_untouched_one(model: Model) -> None:
    first, longer = [("user", story(1))], [("user", story(1)), ("assistant", "Yes."), ("user", "And then?")]
    model.ask(first)
    (expected,), (kept,) = model.ask(longer)  # from its slot
    for i in range(2, 5):
        model.ask([("user", story(i))])  # takes the slots
    (again,), (end,) = model.ask(longer)
    assert kept.n_cached > 100
    assert end.n_cached > 100
    assert again == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_several_choices_prefill_once(model: Model, temperature: float) -> None:
    sampling = wire.Sampling(temperature=temperature, seed=5)
    texts, ends = model.ask([("user", story(1))], n=2, sampling=sampling)
    assert (ends[0].n_cached, ends[1].n_cached > 100) == (0, True)
    if temperature == 0.0:
        assert texts[0] == texts[1]


def test_the_same_question_and_an_edited_one_keep_the_history(model: Model) -> None:
    first = [("user", story(1))]
    (answer,), _ = model.ask(first)
    (again,), (end,) = model.ask(first)
    assert again == answer
    assert end.n_cached > 100
    longer = [*first, ("assistant", answer), ("user", "And then? " * 10)]
    _, (end,) = model.ask(longer)
    assert end.n_cached > 100
    _, (end,) = model.ask([*longer[:-1], ("user", "And now? " * 10)])
    assert end.n_cached > 100


def test_a_sliding_window_model_can_drop_the_end_of_a_sequence() -> None:
    """Its window is cached in full size, so that what lies before the window is still there."""
    model = Model(architectures.model("gemma3"), n_slots=1)
    assert model.engine.caps.truncates is Truncates.FREELY
    long = [("user", story(1) + story(2) + story(3))]
    short = [("user", story(1) + "And the end?")]
    (fresh,), (end,) = model.ask(short)
    assert end.n_cached == 0
    model.ask([("user", "unrelated " * 80)])
    model.ask(long)
    model.scheduler.prefixes._store.entries.clear()  # type: ignore[union-attr]
    (cut,), (end,) = model.ask(short)  # goes back by several windows
    assert end.n_cached > 90
    assert cut == fresh
    model.engine.close()


@pytest.mark.parametrize("kv", ["unified", "separate"])
def test_a_loaded_state_of_a_sliding_window_model_is_never_cut(kv: str) -> None:
    """It lacks what lies before the window, and a shorter prompt that began with it would get a wrong answer."""
    model = Model(architectures.model("gemma3"), n_slots=1, kv=kv)
    short, long = [("user", story(1) + "The end?")], [("user", story(1) + story(2))]
    (fresh,), _ = model.ask(short)
    model.scheduler.prefixes._store.entries.clear()  # type: ignore[union-attr]
    model.scheduler._slots[0].last_used = 0  # not worth a state
    model.ask(long)
    model.ask([("user", "unrelated " * 80)])
    _, (end,) = model.ask(long)
    assert end.n_cached > 200  # from a state
    (again,), (end,) = model.ask(short)
    assert end.cache_miss > 90
    assert end.n_cached < 10
    assert again == fresh
    model.engine.close()


def test_a_hybrid_model_keeps_few_states_of_a_conversation() -> None:
    model = Model(architectures.model("falcon-h1"))
    assert model.engine.caps.truncates is Truncates.NEVER
    messages = [("user", story(1))]
    for _ in range(6):
        (answer,), _ = model.ask(messages)
        messages += [("assistant", answer), ("user", "Go on.")]
    store = model.scheduler.prefixes._store
    assert store is not None
    assert 1 <= len(store.entries) <= 4
    model.engine.close()
