"""Tokenize and Detokenize over the scripted engine: control tokens come only from structure; every error."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai import wire
from tinyoai.engine import tokenization
from tinyoai.engine.fake import BOS, IM_END, IM_START, FakeEngine
from tinyoai.engine.rendering import ChatRenderer

ENGINE = FakeEngine(name="fake")
RENDERER = ChatRenderer(wire.Load(path="", name="fake", engine="fake"), ENGINE)


def tokenize(*prompt: wire.Segment, **fields: Any) -> Any:
    """The result."""
    body = wire.Tokenize(prompt=list(prompt), **fields)
    return tokenization.answer(wire.Request(id=7, body=body), ENGINE, RENDERER)


def detokenize(ids: list[int]) -> Any:
    """The result."""
    return tokenization.answer(wire.Request(id=7, body=wire.Detokenize(ids=ids)), ENGINE, RENDERER)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_tokenize_and_detokenize(text: str) -> None:
    assert detokenize(tokenize(wire.Text(text)).ids).text == text


def test_control_tokens_come_only_from_structure_and_have_texts() -> None:
    prompt = [
        wire.Special("bos"),
        wire.Special("<|im_start|>"),
        wire.Text("a<|im_end|>"),
        wire.Special("<|im_end|>"),
    ]
    tokens = tokenize(*prompt, pieces=True, text=True)
    assert tokens.ids == [BOS, IM_START, *b"a<|im_end|>", IM_END]
    assert tokens.text == b"".join(tokens.pieces).decode() == "<s><|im_start|>a<|im_end|><|im_end|>"
    assert detokenize(tokens.ids).text == tokens.text


def test_only_requested_fields_are_sent() -> None:
    tokens = tokenize(wire.Text("abc"))
    assert (tokens.ids, tokens.pieces, tokens.text) == ([97, 98, 99], [], "")


def test_ids_in_a_prompt_are_rendered_as_their_text() -> None:
    assert tokenize(wire.Ids([104, 105]), text=True).text == "hi"


def test_half_a_character_is_a_replacement_character() -> None:
    assert detokenize([0xF0, 0x9F]).text == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("ids", [[260], [-1], [97, 10**9]])
def test_ids_out_of_range_are_refused(ids: list[int]) -> None:
    failed = detokenize(ids)
    assert isinstance(failed, wire.Failed)
    assert (failed.id, failed.kind, failed.param) == (7, "BadRequest", "tokens")
    assert "259" in failed.message


def test_too_much_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "MAX_BYTES", 8)
    monkeypatch.setattr(tokenization, "MAX_IDS", 8)
    assert tokenize(wire.Text("12345678")).ids
    for failed in (tokenize(wire.Text("12345"), wire.Text("\u00e9\u00e9")), detokenize([97] * 9)):
        assert isinstance(failed, wire.Failed)
        assert "the limit is 8" in failed.message


def test_text_that_has_no_bytes_is_refused() -> None:
    assert tokenize(wire.Text("\ud800")).kind == "BadRequest"


def test_a_conversation_is_rendered() -> None:
    body = wire.Tokenize(
        prompt=wire.Conversation(messages=[wire.Message(role="user", content="<s>")]), text=True
    )
    tokens = tokenization.answer(wire.Request(id=7, body=body), ENGINE, RENDERER)
    assert isinstance(tokens, wire.Tokens)
    assert tokens.text == "<s><|im_start|>user\n<s><|im_end|>\n<|im_start|>assistant\n"
    assert tokens.ids.count(BOS) == 1


def test_markup_makes_control_tokens_and_text_does_not() -> None:
    markup = tokenize(wire.Markup("<|im_start|>x<|im_end|>"), wire.Text("<|im_end|>"))
    assert markup.ids == [IM_START, 120, IM_END, *b"<|im_end|>"]
