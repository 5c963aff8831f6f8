"""The engine over the real library: every check without which it crashes or lies, and every kind of model."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_scheduler import finish, submit, text_of
from tests.engines import make
from tinyoai import wire
from tinyoai.engine.contract import EngineError, ModelRefused, Row
from tinyoai.engine.ctransformers import engine as module
from tinyoai.engine.ctransformers.engine import CTransformersEngine, open_model
from tinyoai.engine.scheduler import Scheduler
from tinyoai.host import memory


def opened(path: Path, model_type: str | None = None, **fields: Any) -> CTransformersEngine:
    """An engine with few slots."""
    options = {"name": "m", "n_ctx": 0, "n_slots": 2, "n_batch": 32, "gpu_layers": 0} | fields
    return open_model(str(path), model_type=model_type, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's models are."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[CTransformersEngine]:
    """A small llama."""
    made = opened(make.llama(folder / "llama.gguf"), n_slots=4)
    yield made
    made.close()


def logits(engine: CTransformersEngine, slot: int = 0) -> list[float]:
    """A copy of a slot's logits."""
    return list(engine.logits(slot)[0 : engine.info.n_vocab])


# -- text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "h\u00e9llo",
        "\N{GRINNING FACE}" * 300,
        "\u6f22\u5b57" * 50,
        "\t\t\t\t",
        "   ",
        "a  b",
        "\r\n\n",
        "x" * 5000,
        "\x7f\x01",
    ],
)
def test_text_survives_the_tokenizer(engine: CTransformersEngine, text: str) -> None:
    ids = engine.tokenize(text)
    assert b"".join(engine.piece(token) for token in ids).decode() == " " + text


def test_empty_text_is_no_tokens(engine: CTransformersEngine) -> None:
    assert engine.tokenize("") == []


@pytest.mark.parametrize("text", ["a\0b", "\0", "\ud800", "a\udfffb"])
def test_text_that_the_library_would_misread_is_refused(engine: CTransformersEngine, text: str) -> None:
    with pytest.raises(ValueError, match=r"NUL|surrogate"):
        engine.tokenize(text)


@pytest.mark.parametrize("text", ["<s>", "\n<s>", "a<s>b", "</s>", "<|im_start|>system", "<|im_end|>"])
def test_plain_text_never_becomes_a_control_token(engine: CTransformersEngine, text: str) -> None:
    ids = engine.tokenize(text)
    assert not set(ids) & set(engine.info.special.values())
    assert b"".join(engine.piece(token) for token in ids).decode() == " " + text


def test_the_library_alone_would_make_one(engine: CTransformersEngine) -> None:
    # the check above is worth nothing unless the merge really happens
    assert 1 in engine._tokenize("\n<s>")


# -- evaluating --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        Row(0, [], 0),
        Row(0, [1] * 33, 0),
        Row(0, [-1], 0),
        Row(0, [10**6], 0),
        Row(0, [2**32 + 5], 0),
        Row(0, [True], 0),
        Row(0, [1], -1),
        Row(0, [1], 400),
        Row(1, [1], 5),
    ],
)
def test_rows_that_the_library_would_choke_on(engine: CTransformersEngine, row: Row) -> None:
    engine.eval([Row(0, [1, 2, 3], 0)], 1)
    with pytest.raises(EngineError):
        engine.eval([row], 1)


def test_the_context_ends_where_it_ends(folder: Path) -> None:
    small = opened(make.llama(folder / "small.gguf"), n_ctx=64)
    for at in range(0, 64, 32):
        small.eval([Row(0, [5] * 32, at)], 1)
    with pytest.raises(EngineError):
        small.eval([Row(0, [5], 64)], 1)
    small.close()


def test_logits_before_any_evaluation_are_refused(folder: Path) -> None:
    fresh = opened(
        folder / "small.gguf" if (folder / "small.gguf").exists() else make.llama(folder / "small.gguf")
    )
    with pytest.raises(EngineError):
        fresh.logits(1)
    fresh.close()


def test_rows_side_by_side_equal_rows_alone(engine: CTransformersEngine) -> None:
    prompts = [[1, *range(270 + 7 * i, 290 + 7 * i)] for i in range(4)]
    alone = []
    for prompt in prompts:
        engine.eval([Row(0, prompt, 0)], 1)
        alone.append(logits(engine))
    for _ in range(20):
        engine.eval([Row(i, prompt, 0) for i, prompt in enumerate(prompts)], 1)
        assert [logits(engine, i) for i in range(4)] == alone


def test_threads_do_not_change_the_numbers(engine: CTransformersEngine) -> None:
    found = []
    for threads in (1, 2):
        engine.eval([Row(0, list(range(265, 290)), 0)], threads)
        found.append(logits(engine))
    assert found[0] == found[1]


def test_a_bad_row_among_good_ones_raises_and_the_next_step_works(engine: CTransformersEngine) -> None:
    with pytest.raises(EngineError):
        engine.eval([Row(0, [1], 0), Row(1, [-5], 0), Row(2, [1], 0)], 1)
    engine.eval([Row(i, [1], 0) for i in range(4)], 1)


# -- the same answer again -----------------------------------------------------------------------------


def generate(
    scheduler: Scheduler, engine: CTransformersEngine, number: int, prompt: str, *, exact: bool
) -> tuple[str, int]:
    """Text and reused tokens of one sampled answer."""
    request = wire.Generate(
        id=number,
        prompt=[wire.Special("bos"), wire.Text(prompt)],
        sampling=wire.Sampling(temperature=0.9, seed=5),
        max_tokens=70,
        exact=exact,
        ignore_eos=True,
    )
    events = finish(scheduler, submit(scheduler, engine, request))  # type: ignore[arg-type]
    accepted = next(e for e in events if isinstance(e, wire.Accepted))
    return text_of(events), accepted.n_cached


def test_equal_seeds_give_equal_text_whatever_the_cache_holds(engine: CTransformersEngine) -> None:
    def fresh() -> Scheduler:
        return Scheduler(engine, n_threads=1, n_queue=8, clock=lambda: 0.0)  # type: ignore[arg-type]

    story = "once upon a time there was a small model that had to say the same thing twice and then again"
    long = story + ", for all who asked with the same seed and did not care what others had asked before them"
    expected = {text: generate(fresh(), engine, 1, text, exact=True)[0] for text in (story, long)}
    scheduler = fresh()
    reused = 0
    for number, text in enumerate([story, long, story, story + " x", long, story, long, long], 2):
        said, n_cached = generate(scheduler, engine, number, text, exact=True)
        reused += n_cached
        if text in expected:
            assert said == expected[text]
    assert reused > 0


def test_a_conversation_reuses_all_it_can_when_nobody_asks_for_the_same_again(
    engine: CTransformersEngine,
) -> None:
    scheduler = Scheduler(engine, n_threads=1, n_queue=8, clock=lambda: 0.0)  # type: ignore[arg-type]
    prompt = "tell me something of what you have been told, so that it takes a while to read it all again"
    said, _ = generate(scheduler, engine, 1, prompt, exact=False)
    _, n_cached = generate(scheduler, engine, 2, prompt, exact=False)
    assert n_cached == len(engine.tokenize(prompt))
    assert said


# -- kinds of models -----------------------------------------------------------------------------------


def test_falcon(folder: Path) -> None:
    falcon = opened(make.falcon(folder / "falcon.gguf"))
    assert (falcon.info.architecture, falcon.info.bos_id, falcon.info.first_piece_space) == (
        "falcon",
        -1,
        False,
    )
    text = "hell \u00e9 " * 900  # beyond what the byte-pair tokenizer takes at once
    ids = falcon.tokenize(text)
    assert b"".join(falcon.piece(token) for token in ids).decode() == text
    assert falcon.info.special["<|endoftext|>"] not in falcon.tokenize("<|endoftext|>")
    falcon.eval([Row(0, ids[:32], 0)], 1)
    assert len(set(logits(falcon))) > 100
    falcon.close()


def test_a_legacy_gpt2_with_its_type_stated(folder: Path) -> None:
    path = make.gpt2_ggml(folder / "gpt2.bin")
    with pytest.raises(ModelRefused, match="--model-type"):
        opened(path)
    gpt2 = opened(path, "gpt2")
    assert (gpt2.info.architecture, gpt2.info.n_ctx, gpt2.info.quantization) == ("gpt2", 128, "GGML")
    ids = gpt2.tokenize("hello")
    assert b"".join(gpt2.piece(token) for token in ids) == b"hello"
    gpt2.eval([Row(0, ids, 0)], 1)
    assert len(set(logits(gpt2))) > 100
    gpt2.close()


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, 2**31 - 1, "n_vocab"),
        (0, -5, "n_vocab"),
        (1, 0, "n_ctx"),
        (2, -1, "n_embd"),
        (3, 3, "heads"),
        (4, 900, "cut short"),
    ],
)
def test_a_legacy_header_that_would_hang_or_crash_the_library(
    folder: Path, at: int, value: int, words: str
) -> None:
    whole = bytearray(make.gpt2_ggml(folder / "whole.bin").read_bytes())
    struct.pack_into("<i", whole, 4 + 4 * at, value)
    path = folder / "bad.bin"
    path.write_bytes(whole)
    with pytest.raises(ModelRefused, match=words):
        opened(path, "gpt2")


def test_rows_that_abort_the_library_on_arm_are_refused_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(ModelRefused, match=r"rows of 96 values in Q8_0.*multiples of 64 on ARM"):
        opened(make.llama(folder / "odd.gguf", n_embd=96))
    whole = bytearray(make.gpt2_ggml(folder / "odd.bin", n_embd=96).read_bytes())
    monkeypatch.undo()  # the library, which has to be this machine's, is opened before a legacy header is read
    monkeypatch.setattr(module, "_odd", lambda n: n % 64 != 0)
    for ftype in (2, 2007):  # Q4_0; Q8_0 of the format's second version
        struct.pack_into("<i", whole, 4 + 4 * 5, ftype)
        (folder / "odd.bin").write_bytes(whole)
        with pytest.raises(ModelRefused, match=r"quantized rows of 96 values.*multiples of 64 on ARM"):
            opened(folder / "odd.bin", "gpt2")
    opened(make.gpt2_ggml(folder / "odd-f32.bin", n_embd=96), "gpt2").close()


def test_numbers_that_are_not_finite_are_found_at_load(folder: Path) -> None:
    path = make.llama(folder / "nan.gguf")
    whole = bytearray(path.read_bytes())
    from tinyoai import gguf

    header = gguf.read_header(path)
    # one scale of the output matrix; and a norm, whose NaN the library's quantization hides as zeros
    for name, value in (
        ("output.weight", struct.pack("<H", 0x7E00)),
        ("output_norm.weight", struct.pack("<f", float("nan")) * 64),
    ):
        changed, at = bytearray(whole), header.data_at + header.tensors[name].offset
        changed[at : at + len(value)] = value
        path.write_bytes(changed)
        with pytest.raises(ModelRefused, match="nonsense"):
            opened(path)


def test_too_little_memory_is_told_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make.llama(folder / "memory.gguf")
    monkeypatch.setattr(memory, "available", lambda: 70_000_000)
    with pytest.raises(ModelRefused, match=r"--ctx-size \d+ would fit"):
        opened(path, n_ctx=100_000)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(ModelRefused, match="smaller"):
        opened(path)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="pip install"):
        module._library_path(False)


def test_the_package_itself_is_never_imported(engine: CTransformersEngine) -> None:
    import sys

    assert engine.info.engine == "ctransformers"
    assert "ctransformers" not in sys.modules


@pytest.mark.parametrize("n_batch", [1, 31, 33, 600])
def test_batches_are_whole_blocks_that_the_library_can_take(folder: Path, n_batch: int) -> None:
    made = opened(make.llama(folder / "batch.gguf"), n_batch=n_batch)
    assert made.n_batch % made.block == 0
    assert 32 <= made.n_batch <= 512
    made.close()
