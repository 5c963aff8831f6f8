"""Embeddings in the scheduler: exact on the scripted engine, and reproducible bit for bit on the library."""

import math
import random
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from tests.engine.test_scheduler import IDS, ask, finish, last, scheduler, submit, text_of
from tests.engines import make
from tinyoai import wire
from tinyoai.engine.contract import Engine, Row, Want
from tinyoai.engine.ctransformers.engine import CTransformersEngine
from tinyoai.engine.ctransformers.opening import open_model
from tinyoai.engine.fake import N_EMBD
from tinyoai.engine.rendering import ChatRenderer
from tinyoai.engine.requests import prepare
from tinyoai.engine.scheduler import Scheduler


def embed(text: str, *end: wire.Segment, **fields: Any) -> wire.Request:
    """Returns an Embed in a request with a new id."""
    body = wire.Embed(prompt=[wire.Special("bos"), wire.Text(text), *end], **fields)
    return wire.Request(id=next(IDS), body=body)


def vectors(events: list[wire.ToServer]) -> dict[int, bytes]:
    """Returns every vector by its request id."""
    return {event.id: event.values for event in events if isinstance(event, wire.Vector)}


def histogram(text: str) -> list[float]:
    """Returns the scripted engine's embedding of a text."""
    counts = Counter(text.encode())
    length = math.hypot(*counts.values())
    return [counts[byte] / length for byte in range(N_EMBD)]


# -- the scripted engine -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a", "hello", "y" * 300, "h\u00e9llo " * 9])
def test_a_vector_counts_every_token_for_any_chunks(text: str) -> None:
    s, engine = scheduler()
    request = embed(text)
    events = finish(s, submit(s, engine, request))
    assert [type(event) for event in events] == [wire.Accepted, wire.Vector, wire.Done]
    found = struct.unpack(f"<{N_EMBD}f", vectors(events)[request.id])
    assert found == pytest.approx(histogram(text), abs=1e-6)
    done = last(events)
    assert (done.n_prompt, done.n_cached) == (1 + len(text.encode()), 0)


def test_equal_texts_have_equal_vectors_beside_other_requests() -> None:
    s, engine = scheduler(n_slots=3)
    first = embed("the same text")
    alone = vectors(finish(s, submit(s, engine, first)))[first.id]
    out = submit(s, engine, ask('!{"text": "x", "repeat": 200}'))
    asked = [embed(text) for text in ["the same text", "the same text and more", "the same text"]]
    for request in asked:
        out += submit(s, engine, request)
    found = vectors(finish(s, out))
    assert found[asked[0].id] == found[asked[2].id] == alone
    assert found[asked[1].id] != alone


def test_a_text_of_exactly_the_context_length_can_be_embedded() -> None:
    s, engine = scheduler(n_ctx=64)
    assert isinstance(last(finish(s, submit(s, engine, embed("x" * 63)))), wire.Done)
    refused = last(submit(s, engine, embed("x" * 64, param="input[3]")))
    assert (refused.kind, refused.param) == ("ContextLengthExceeded", "input[3]")
    assert "65 tokens" in refused.message
    assert "64 tokens" in refused.message
    assert "answer" not in refused.message


def test_dimensions_beyond_the_model_s() -> None:
    s, engine = scheduler()
    request = embed("ab", dimensions=98)
    found = vectors(finish(s, submit(s, engine, request)))[request.id]
    assert struct.unpack("<98f", found)[97] == 1.0  # dimensions cuts "b" off
    refused = last(submit(s, engine, embed("ab", dimensions=N_EMBD + 1)))
    assert (refused.kind, refused.param) == ("BadRequest", "dimensions")


def test_the_error_of_a_model_without_embeddings_names_others() -> None:
    s, engine = scheduler()
    engine.info = structs.replace(engine.info, n_embd_out=0)
    refused = last(submit(s, engine, embed("ab")))
    assert (refused.kind, refused.param) == ("BadRequest", "model")
    assert "fake" in refused.message
    assert text_of(finish(s, submit(s, engine, ask("still talks")))) == "still talks"


def test_the_error_of_a_model_without_logits_names_the_endpoint() -> None:
    s, engine = scheduler(generates=False)
    refused = last(submit(s, engine, ask("talk")))
    assert (refused.kind, refused.param) == ("BadRequest", "model")
    assert refused.message == "fake makes embeddings and no text; send the text to /v1/embeddings"
    assert isinstance(last(finish(s, submit(s, engine, embed("ab")))), wire.Done)


def test_an_embedding_does_not_evict_a_conversation() -> None:
    s, engine = scheduler(n_slots=2)
    talk = "tell me something long enough to be missed"
    finish(s, submit(s, engine, ask(talk)))
    for number in range(5):
        finish(s, submit(s, engine, embed(f"text {number}")))
    again = finish(s, submit(s, engine, ask(talk)))
    assert again[0].n_cached == again[0].n_prompt - 1  # type: ignore[union-attr]


def test_a_running_answer_continues_beside_a_long_embedding() -> None:
    s, engine = scheduler(n_slots=2, n_ctx=4096)
    talker = ask('!{"text": "x", "repeat": 900}')
    out = submit(s, engine, talker)
    while text_of(out) == "":
        out += s.step()
    reader = embed("y" * 400)
    out = submit(s, engine, reader)
    while reader.id not in vectors(out):
        out += s.step()
    assert 400 // 8 <= len(text_of(out, talker.id)) < 900
    finish(s, out)


def test_a_text_of_one_row_can_come_again_with_the_last_state_as_its_embedding() -> None:
    s, engine = scheduler(n_slots=1, n_ctx=64, n_batch=64, whole_rows=True)
    engine.info = structs.replace(engine.info, pooling="last")
    asked = [embed("the same text") for _ in range(2)]
    found = vectors([event for request in asked for event in finish(s, submit(s, engine, request))])
    assert found[asked[0].id] == found[asked[1].id]


def test_a_cancelled_embedding_frees_its_slot() -> None:
    s, engine = scheduler(n_slots=1)
    request, waiting = embed("y" * 400), embed("z")
    out = [*submit(s, engine, request), *s.step(), *submit(s, engine, waiting)]
    out += [*s.cancel(request.id), *s.cancel(waiting.id)]
    assert s.idle
    assert not vectors(out)
    assert [type(event) for event in out] == [wire.Accepted, wire.Failed, wire.Failed]


def test_an_engine_that_fails_in_the_middle() -> None:
    s, engine = scheduler()
    events = finish(s, submit(s, engine, embed('!{"fail_at": 3}\nabcdef')))
    assert last(events).kind == "ModelError"
    good = embed("next")
    assert good.id in vectors(finish(s, submit(s, engine, good)))


def test_states_that_are_not_finite_are_a_model_error() -> None:
    s, engine = scheduler()
    engine.embedding = lambda row: struct.pack("<f", math.nan) * N_EMBD  # type: ignore[method-assign]
    assert last(finish(s, submit(s, engine, embed("a")))).kind == "ModelError"


# -- the library -------------------------------------------------------------------------------------


STORY = "once upon a time there was a small model that had to embed the same thing twice and then again"
TEXTS = [STORY, STORY + " with more of it", "something else", STORY, STORY[:60], "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this module's models."""
    return tmp_path_factory.mktemp("models")


def opened(path: Path, pooling: str = "", model_type: str | None = None) -> CTransformersEngine:
    """Opens an engine with three slots."""
    return open_model(
        str(path),
        model_type=model_type,
        name="m",
        n_ctx=0,
        n_slots=3,
        n_batch=32,
        gpu_layers=0,
        pooling=pooling,
    )


@pytest.fixture(scope="module", params=["weighted-mean", "mean", "last"])
def engine(folder: Path, request: pytest.FixtureRequest) -> Iterator[CTransformersEngine]:
    """The engine of a small llama with each pooling method."""
    made = opened(make.llama(folder / "llama.gguf"), request.param)
    yield made
    made.close()


def jobs(engine: Engine, texts: list[str], s: Scheduler) -> tuple[list[bytes], int]:
    """Embeds all texts at once. Returns their vectors in order and the number of reused tokens."""
    asked = [embed(text, wire.Special("eos")) for text in texts]
    out: list[wire.ToServer] = []
    for request in asked:
        out += submit(s, engine, request)
    events = finish(s, out)
    found = vectors(events)
    return [found[request.id] for request in asked], sum(
        event.n_cached for event in events if isinstance(event, wire.Done)
    )


def fresh(engine: Engine) -> Scheduler:
    """Returns a scheduler with empty caches."""
    return Scheduler(engine, n_queue=100, clock=lambda: 0.0)


def test_vectors_are_bit_for_bit_independent_of_batches_and_caches(
    engine: CTransformersEngine,
) -> None:
    alone = {text: jobs(engine, [text], fresh(engine))[0][0] for text in TEXTS}
    s, reused = fresh(engine), 0
    for _ in range(3):
        found, n_cached = jobs(engine, TEXTS, s)
        assert found == [alone[text] for text in TEXTS]
        reused += n_cached
    # mean pooling needs the states of all tokens, which no cache has
    assert (reused > 0) == (engine.info.pooling == "last")


@pytest.mark.parametrize(("n", "n_cached"), [(31, 0), (32, 0), (33, 32), (63, 32), (64, 32), (65, 64)])
def test_a_generation_s_prefix_gives_the_same_vector(
    engine: CTransformersEngine, n: int, n_cached: int
) -> None:
    expected = n_cached if engine.info.pooling == "last" else 0  # mean pooling needs the state of every token
    draw = random.Random(n)
    end = [300] * (-n % 32 + 1)  # these tokens complete the last block of the prefix
    for _ in range(20):
        ids = [draw.randrange(3, 450) for _ in range(n)]
        body = wire.Embed(prompt=[wire.Ids(ids)])
        asked = [wire.Request(id=next(IDS), body=body) for _ in range(2)]
        s = fresh(engine)
        alone = finish(s, submit(s, engine, asked[0]))
        s = fresh(engine)
        generate = ask("", prompt=[wire.Ids([*ids, *end])], max_tokens=1, ignore_eos=True)
        finish(s, submit(s, engine, generate))
        beside = finish(s, submit(s, engine, asked[1]))
        assert last(beside).n_cached == expected
        assert vectors(beside)[asked[1].id] == vectors(alone)[asked[0].id]


def test_states_are_those_of_a_fresh_run(engine: CTransformersEngine) -> None:
    ids = [1, *range(270, 280)]
    engine.truncate(0, 0)
    seen: list[bytes] = []
    for begin in (0, 8):
        part = ids[begin : begin + 8]
        engine.eval([Row(0, part, begin, Want.EMBEDDING)])
        states = bytes(engine.embedding(0))
        size = len(states) // len(part)
        seen += [states[i : i + size] for i in range(0, len(states), size)]
    assert len(seen) == len(set(seen)) == len(ids)
    assert all(len(state) == 4 * engine.info.n_embd for state in seen)
    engine.truncate(1, 0)
    for at, token in enumerate(ids):
        engine.eval([Row(1, [token], at, Want.EMBEDDING)])
        assert bytes(engine.embedding(0)) == seen[at]


def test_pooling_is_read_from_the_file_and_a_flag_overrides_it(folder: Path) -> None:
    path = make.llama(folder / "stated.gguf", llama__pooling_type=3)
    for flag, expected in (("", "last"), ("mean", "mean")):
        stated = opened(path, flag)
        assert (stated.info.pooling, stated.info.n_embd_out) == (expected, 64)
        stated.close()
    unstated = opened(make.llama(folder / "unstated.gguf", llama__pooling_type=2))
    assert unstated.info.pooling == "weighted-mean"
    unstated.close()


def test_falcon_embeds_and_a_legacy_gpt2_does_not(folder: Path) -> None:
    falcon = opened(make.falcon(folder / "falcon.gguf"))
    (found,), _ = jobs(falcon, ["hello"], fresh(falcon))
    assert math.hypot(*struct.unpack("<64f", found)) == pytest.approx(1.0, rel=1e-6)
    falcon.close()
    gpt2 = opened(make.gpt2_ggml(folder / "gpt2.bin"), "mean", "gpt2")
    assert (gpt2.info.n_embd_out, gpt2.info.pooling) == (0, "")
    refused = prepare(embed("hello"), gpt2, ChatRenderer(wire.Load(path="", name="m", engine=""), gpt2))
    assert isinstance(refused, wire.Failed)
    assert "gpt2" in refused.message
    gpt2.close()
