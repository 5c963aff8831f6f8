"""The corpus and its encoder: no held-out item is taught, and the encoder equals the library's tokenizer."""

from random import Random

import pytest

from tests.finetune.builtin import BUILTIN
from tinyoai import gguf
from tinyoai.engine.ctransformers.opening import open_model
from training import corpus, facts
from training.tokenizer import SPACE, Tokenizer, train


def test_there_are_enough_countries() -> None:
    assert len(facts.CAPITALS) >= 150
    assert len(set(facts.CAPITALS.values())) == len(facts.CAPITALS)
    for country, city in {
        "France": "Paris",
        "the United Kingdom": "London",
        "Sri Lanka": "Colombo",
        "Niger": "Niamey",
    }.items():
        assert facts.CAPITALS[country] == city


def test_the_same_seed_gives_the_same_corpus() -> None:
    def some(seed: int) -> list[list[corpus.Turn]]:
        rng = Random(seed)
        return [corpus.dialogue(rng) for _ in range(50)]

    assert some(1) == some(1)
    assert some(1) != some(2)


def test_nothing_held_out_is_taught() -> None:
    rng = Random(5)
    names = {corpus.name(rng, held=True) for _ in range(2000)}
    pairs = {corpus.numbers(rng, held=True) for _ in range(2000)}
    for _ in range(3000):
        assert corpus.name(rng) not in names
        assert corpus.numbers(rng) not in pairs
    taught = {turn.content for _ in range(4000) for turn in corpus.dialogue(rng)}
    asked = {
        sample.turns[-2].content
        for sample in corpus.held_out_samples(rng, 50)
        if sample.category == "capitals"
    }
    assert not taught & asked


def test_dialogues_alternate_and_end_with_an_answer() -> None:
    rng = Random(6)
    for _ in range(300):
        turns = corpus.dialogue(rng)
        roles = [turn.role for turn in turns if turn.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(turn.content for turn in turns)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The recipe's encoder with the built-in model's vocabulary."""
    tokens = gguf.read_header(BUILTIN).metadata["tokenizer.ggml.tokens"]
    return Tokenizer([token.decode() for token in tokens[261:]])


def test_the_recipe_encodes_as_the_library_does(tokenizer: Tokenizer) -> None:
    engine = open_model(
        str(BUILTIN), model_type=None, name="m", n_ctx=64, n_slots=1, n_batch=32, gpu_layers=0
    )
    rng = Random(8)
    texts = [turn.content for _ in range(200) for turn in corpus.dialogue(rng)]
    letters = "abcxyz ABC  019.,!?'-\n\t\u00e9\u6f22\N{GRINNING FACE}"
    texts += ["".join(rng.choice(letters) for _ in range(rng.randint(1, 40))) for _ in range(500)]
    for text in texts:
        assert tokenizer.encode(text) == engine.tokenize(text), text
    engine.close()


def test_learning_begins_after_the_role(tokenizer: Tokenizer) -> None:
    head = tokenizer.encode("assistant\n")
    for said in ("Hello!", " spaced", "7", "\u00e9"):
        assert tokenizer.encode("assistant\n" + said)[: len(head)] == head


def test_pieces_have_no_digits_no_newlines_and_only_leading_spaces() -> None:
    made = train(["the 7 cats\nand the 9 dogs"] * 5, 400)
    for piece in made.pieces:
        assert len(piece) == 1 or not any(c.isdigit() for c in piece)
        assert "\n" not in piece
        assert SPACE not in piece[1:]
    text = "the cats and 79 dogs"
    assert made.decode(made.encode(text)) == " " + text
