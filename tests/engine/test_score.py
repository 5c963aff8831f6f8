"""Scores of documents in the scheduler, on the scripted engine, and the prompts of pairs."""

import math
from typing import Any

import pytest
from msgspec import structs

from tests.engine.test_scheduler import IDS, ask, finish, last, scheduler, submit, text_of
from tinyoai import wire
from tinyoai.engine import pair_prompt
from tinyoai.engine.contract import Copies, PairForm

QUERY = "what is red"


def rank(document: str, query: str = QUERY, **fields: Any) -> wire.Request:
    """Returns a Rank in a request with a new id."""
    return wire.Request(id=next(IDS), body=wire.Rank(query=query, document=document, **fields))


def scores(events: list[wire.ToServer]) -> dict[int, float]:
    """Returns every score by its request id."""
    return {event.id: event.value for event in events if isinstance(event, wire.Score)}


@pytest.mark.parametrize(
    ("document", "expected"),
    [("", 0), ("red", 1), ("is it red or is it blue", 2), ("y " * 150 + "what is", 2), ("what red is", 3)],
)
@pytest.mark.parametrize("caps", [{}, {"whole_rows": True, "n_batch": 512}])
def test_a_pair_is_scored_for_any_cuts(document: str, expected: int, caps: dict[str, Any]) -> None:
    s, engine = scheduler(**caps)
    request = rank(document)
    events = finish(s, submit(s, engine, request))
    assert [type(event) for event in events] == [wire.Accepted, wire.Score, wire.Done]
    assert scores(events) == {request.id: expected}
    assert last(events).n_prompt == 3 + len(QUERY + document)


def test_pairs_of_one_query_share_the_beginning_of_their_prompts() -> None:
    s, engine = scheduler(n_slots=2, copies=Copies.PREFIX)
    query = "a long query " * 9
    first = finish(s, submit(s, engine, rank("a", query)))
    other = rank("query query", query)
    second = finish(s, submit(s, engine, other))
    assert (last(first).n_cached, last(second).n_cached) == (0, 1 + len(query) + 1)
    assert scores(second) == {other.id: 1.0}


def test_a_pair_of_one_row_can_come_again() -> None:
    s, engine = scheduler(n_slots=1, n_ctx=64, n_batch=64, whole_rows=True)
    for _ in range(2):
        request = rank("red")
        assert scores(finish(s, submit(s, engine, request))) == {request.id: 1.0}


def test_a_score_does_not_evict_a_conversation() -> None:
    s, engine = scheduler(n_slots=2)
    talk = "tell me something long enough to be missed"
    finish(s, submit(s, engine, ask(talk)))
    for number in range(5):
        finish(s, submit(s, engine, rank(f"text {number}")))
    again = finish(s, submit(s, engine, ask(talk)))
    assert again[0].n_cached == again[0].n_prompt - 1  # type: ignore[union-attr]


def test_a_pair_that_is_too_long_names_its_document() -> None:
    s, engine = scheduler(n_ctx=64)
    room = 64 - 3 - len(QUERY)
    assert isinstance(last(finish(s, submit(s, engine, rank("x" * room)))), wire.Done)
    refused = last(submit(s, engine, rank("x" * (room + 1), param="documents[3]")))
    assert (refused.kind, refused.param) == ("ContextLengthExceeded", "documents[3]")
    assert refused.message == (
        "the query with documents[3] has 65 tokens, but the context window of this model is 64 tokens; "
        "shorten documents[3]"
    )


def test_the_error_of_a_model_without_a_rank_head() -> None:
    s, engine = scheduler(pair=None)
    refused = last(submit(s, engine, rank("a")))
    assert (refused.kind, refused.param) == ("BadRequest", "model")
    assert refused.message == "fake cannot rank: it has no rank head; choose a reranker"
    assert text_of(finish(s, submit(s, engine, ask("still talks")))) == "still talks"


def test_a_model_that_only_ranks_refuses_everything_else() -> None:
    s, engine = scheduler(generates=False)
    engine.info = structs.replace(engine.info, n_embd_out=0)
    embed = wire.Request(id=next(IDS), body=wire.Embed(prompt=[wire.Text("a")]))
    for request in (ask("talk"), embed):
        refused = last(submit(s, engine, request))
        assert (refused.kind, refused.param) == ("BadRequest", "model")
        assert refused.message.startswith("fake ranks documents and ")
        assert "/v1/rerank" in refused.message
    assert scores(finish(s, submit(s, engine, rank("red"))))


def test_a_score_that_is_not_finite_is_a_model_error() -> None:
    s, engine = scheduler()
    engine.score = lambda row: math.nan  # type: ignore[method-assign]
    assert last(finish(s, submit(s, engine, rank("a")))).kind == "ModelError"


def test_a_cancelled_score_frees_its_slot() -> None:
    s, engine = scheduler(n_slots=1)
    request, waiting = rank("y" * 400), rank("z")
    out = [*submit(s, engine, request), *s.step(), *submit(s, engine, waiting)]
    out += [*s.cancel(request.id), *s.cancel(waiting.id)]
    assert s.idle
    assert [type(event) for event in out] == [wire.Accepted, wire.Failed, wire.Failed]


# -- the prompts ---------------------------------------------------------------------------------------


SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>")
FORM = PairForm("<|im_start|>user\nQ: {query}\nD: {document}<|im_end|>\n<think>")


def test_ids_are_put_around_the_texts() -> None:
    form = PairForm("", (1,), (2, 3), ())
    expected = [wire.Ids([1]), wire.Text("a"), wire.Ids([2, 3]), wire.Text("b"), wire.Ids([])]
    assert pair_prompt.segments("a", "b", form, SPECIAL) == expected


def test_a_template_s_control_tokens_are_its_own() -> None:
    expected = [
        wire.Special("<|im_start|>"),
        wire.Text("user\nQ: a<|im_end|>\nD: <think>"),
        wire.Special("<|im_end|>"),
        wire.Text("\n"),
        wire.Special("<think>"),
    ]
    assert pair_prompt.segments("a<|im_end|>", "<think>", FORM, SPECIAL) == expected


@pytest.mark.parametrize("query", ["{document}", "{query}", "\\1 {0} {"])
def test_a_text_is_never_a_place_for_another(query: str) -> None:
    text = pair_prompt.segments(query, "secret", FORM, SPECIAL)[1]
    assert text == wire.Text(f"user\nQ: {query}\nD: secret")


def test_a_marker_that_a_text_completes_stays_text() -> None:
    form = PairForm("<|im_{query}{document}")
    assert pair_prompt.segments("start", "|>", form, SPECIAL) == [wire.Text("<|im_start|>")]
