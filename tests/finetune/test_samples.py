"""Examples to samples: input, learned tokens, and cuts."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec

from tests.finetune.builtin import CHAT, tokenize
from tinyoai.engine.ctransformers.engine import CTransformersEngine
from tinyoai.finetune import samples
from tinyoai.finetune.dataset import Example, Turn
from tinyoai.finetune.samples import Sample
from tinyoai.wire import Markup, Segment, Special, Text

PLAIN = msgspec.structs.replace(CHAT, chat=False)


def test_each_answer_of_a_conversation_is_a_sample(engine: CTransformersEngine) -> None:
    turns = [Turn(role="user", content="a?"), Turn(role="assistant", content="one."), Turn(role="user", content="b?"),
             Turn(role="assistant", content="two.")]  # fmt: skip
    first, second = tokenize(engine, Example(messages=turns))
    assert second.ids[: first.n_prompt] == first.ids[: first.n_prompt]
    for sample, text in ((first, b"one."), (second, b"two.")):
        assert b"".join(map(engine.piece, sample.ids[sample.n_prompt :])) == text
        assert sample.ids[-1] == engine.info.special["<|im_end|>"]
    assert samples.cut([first, second], first.n_prompt + 1)[0].ids == first.ids[: first.n_prompt + 1]
    assert len(samples.cut([first, second], first.n_prompt)) == 0


def test_a_text_is_learned_whole(engine: CTransformersEngine) -> None:
    (sample,) = tokenize(engine, Example(text="Once upon a time"), PLAIN)
    assert sample.n_prompt == 1
    assert sample.ids[0] == engine.info.bos_id
    (sample,) = tokenize(engine, Example(prompt="Once upon", completion=" a time"), PLAIN)
    assert b"".join(map(engine.piece, sample.ids)).strip() == b"Once upon a time"
    assert b"".join(map(engine.piece, sample.ids[sample.n_prompt :])) == b" a time"


def letters(prompt: Sequence[Segment]) -> list[int]:
    """Returns a tokenizer with one token for each character, and token 1 for each control token."""
    ids: list[int] = []
    for segment in prompt:
        ids += map(ord, segment.text) if isinstance(segment, Text | Markup) else [1]
    return ids


def test_an_answer_after_a_word_begins_with_a_space() -> None:
    for prompt, said in (
        ([Special("bos"), Text("two words")], " yes"),
        ([Special("bos"), Text("a line\n")], "yes"),
        ([Text("assistant"), Markup(":")], " yes"),
        ([Text("assistant"), Markup("\n")], "yes"),
        ([Text("assistant"), Special("<|im_end|>")], "yes"),
    ):
        sample = samples._sample(prompt, "yes", 2, letters)
        assert sample == Sample([*letters(prompt), *map(ord, said), 2], len(letters(prompt)))


def test_tokens_that_the_answer_changes_are_learned_too() -> None:
    def pairs(prompt: Sequence[Segment]) -> list[int]:
        ids = letters(prompt)
        return [hash(tuple(ids[i : i + 2])) for i in range(0, len(ids), 2)]

    sample = samples._sample([Text("abc\n"), Text("d\n ")], "xy", -1, pairs)
    assert (sample.n_prompt, len(sample.ids)) == (3, 5)


def test_a_text_ends_where_the_model_has_a_token_for_it() -> None:
    for eos_id, end in ((2, [2]), (-1, [])):
        info: Any = SimpleNamespace(eos_id=eos_id, special={})
        assert samples.tokenize(Example(text="ab"), letters, info, PLAIN) == [Sample([1, 97, 98, *end], 1)]
