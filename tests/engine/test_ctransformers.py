"""The engine over the real library: checks that prevent crashes and wrong results; every kind of model."""

import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_scheduler import finish, submit, text_of
from tests.engines import make
from tinyoai import gguf, wire
from tinyoai.engine import threads
from tinyoai.engine.contract import Copies, EngineError, ModelRefused, Row, Truncates, Want
from tinyoai.engine.ctransformers import facts, library
from tinyoai.engine.ctransformers.engine import N_OUTPUTS, CTransformersEngine
from tinyoai.engine.ctransformers.opening import open_engine, open_model
from tinyoai.engine.scheduler import Scheduler
from tinyoai.host import memory


def opened(path: Path, model_type: str | None = None, **fields: Any) -> CTransformersEngine:
    """Opens an engine with few slots."""
    options = {"name": "m", "n_ctx": 0, "n_slots": 2, "n_batch": 32, "gpu_layers": 0} | fields
    return open_model(str(path), model_type=model_type, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this module's models."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[CTransformersEngine]:
    """The engine of a small llama."""
    made = opened(make.llama(folder / "llama.gguf"), n_slots=4)
    yield made
    made.close()


def run(engine: CTransformersEngine, *rows: Row) -> None:
    """Runs one step, in which each row continues its sequence at its position."""
    for row in rows:
        engine.truncate(row.seq, row.pos)
    engine.eval(rows)


def logits(engine: CTransformersEngine, row: int = 0, at: int = -1) -> list[float]:
    """Returns a copy of a row's logits in the last eval."""
    return list(engine.logits(row, at)[0 : engine.info.n_vocab])


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
def test_text_that_the_library_misreads_is_refused(engine: CTransformersEngine, text: str) -> None:
    with pytest.raises(ValueError, match=r"NUL|surrogate"):
        engine.tokenize(text)


@pytest.mark.parametrize("text", ["<s>", "\n<s>", "a<s>b", "</s>", "<|im_start|>system", "<|im_end|>"])
def test_plain_text_never_becomes_a_control_token(engine: CTransformersEngine, text: str) -> None:
    ids = engine.tokenize(text)
    assert not set(ids) & set(engine.info.special.values())
    assert b"".join(engine.piece(token) for token in ids).decode() == " " + text


def test_the_library_alone_makes_a_control_token(engine: CTransformersEngine) -> None:
    # the check above is meaningful only if the library really merges the text into a control token
    assert 1 in engine.handle(0).tokenize("\n<s>")


def test_control_tokens_have_texts_only_on_request(engine: CTransformersEngine) -> None:
    im_start = engine.info.special["<|im_start|>"]
    assert (engine.piece(im_start), engine.piece(im_start, special=True)) == (b"", b"<|im_start|>")
    letter = engine.tokenize("x")[-1]
    assert engine.piece(letter) == engine.piece(letter, special=True) == b" x"


def test_a_prompt_is_encoded_by_its_structure(engine: CTransformersEngine) -> None:
    special, text = engine.info.special, "<|im_start|>a"
    prompt = [wire.Special("bos"), wire.Text(text), wire.Markup(text), wire.Ids([7, 8])]
    assert engine.encode(prompt) == [
        1,
        *engine.tokenize(text),
        special["<|im_start|>"],
        *engine.tokenize("a"),
        7,
        8,
    ]
    for bad in (wire.Ids([10**6]), wire.Special("<|none|>"), wire.Text("a\0")):
        with pytest.raises(ValueError, match=r"vocabulary|control token|NUL"):
            engine.encode([bad])


# -- evaluating --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        Row(0, [], 3),
        Row(0, [1] * 33, 3),
        Row(0, [1] * (N_OUTPUTS + 1), 3, Want.ALL),
        Row(0, [1] * (N_OUTPUTS + 1), 3, Want.EMBEDDING),
        Row(0, [-1], 3),
        Row(0, [10**6], 3),
        Row(0, [2**32 + 5], 3),
        Row(0, [True], 3),
        Row(0, [1], -1),
        Row(0, [1], 2),
        Row(0, [1], 400),
        Row(1, [1], 5),
        Row(4, [1], 0),
        Row(-1, [1], 0),
        Row(0, [1], 3, adapters=("lora",)),
    ],
)
def test_rows_that_would_crash_the_library(engine: CTransformersEngine, row: Row) -> None:
    run(engine, Row(0, [1, 2, 3], 0))
    engine.truncate(1, 0)
    with pytest.raises(EngineError):
        engine.eval([row])
    engine.eval([Row(0, [1], 3)])  # the context did not change


def test_two_rows_of_one_sequence_are_refused(engine: CTransformersEngine) -> None:
    engine.truncate(0, 0)
    with pytest.raises(EngineError, match="same sequence"):
        engine.eval([Row(0, [1], 0), Row(0, [1], 0)])


def test_positions_beyond_the_context_are_refused(folder: Path) -> None:
    small = opened(make.llama(folder / "small.gguf"), n_ctx=64)
    for at in range(0, 64, 32):
        small.eval([Row(0, [5] * 32, at)])
    with pytest.raises(EngineError):
        small.eval([Row(0, [5], 64)])
    small.close()


def test_only_requested_outputs_of_the_last_eval_can_be_read(engine: CTransformersEngine) -> None:
    run(engine, Row(0, [1, 2], 0), Row(1, [1, 2], 0, Want.NOTHING), Row(2, [1], 0, Want.EMBEDDING))
    for row, at in ((0, 0), (0, 2), (1, -1), (2, -1), (3, -1), (-1, -1)):
        with pytest.raises(EngineError):
            engine.logits(row, at)
    for row in (0, 1, 3):
        with pytest.raises(EngineError):
            engine.embedding(row)
    assert logits(engine, 0) == logits(engine, 0, 1)
    with pytest.raises(EngineError):
        engine.eval([Row(0, [-1], 2)])
    with pytest.raises(EngineError):
        engine.logits(0)


def test_rows_side_by_side_equal_rows_alone(engine: CTransformersEngine) -> None:
    prompts = [[1, *range(270 + 7 * i, 290 + 7 * i)] for i in range(4)]
    alone = []
    for prompt in prompts:
        run(engine, Row(0, prompt, 0))
        alone.append(logits(engine))
    for _ in range(20):
        run(engine, *(Row(i, prompt, 0) for i, prompt in enumerate(prompts)))
        assert [logits(engine, i) for i in range(4)] == alone


def test_rows_are_numbered_by_their_place_and_not_by_their_sequence(engine: CTransformersEngine) -> None:
    run(engine, Row(0, [1, 300], 0), Row(3, [1, 310], 0))
    zero, three = logits(engine, 0), logits(engine, 1)
    run(engine, Row(3, [1, 310], 0), Row(0, [1, 300], 0))
    assert (logits(engine, 0), logits(engine, 1)) == (three, zero)
    assert zero != three


def test_threads_do_not_change_the_numbers(engine: CTransformersEngine) -> None:
    found = []
    for n_threads in (1, 2):
        engine.n_threads = n_threads
        run(engine, Row(0, list(range(265, 290)), 0))
        found.append(logits(engine))
    engine.n_threads = 1
    assert found[0] == found[1]


def test_rows_share_the_threads(engine: CTransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    real = library.Handle.eval
    monkeypatch.setattr(
        library.Handle,
        "eval",
        lambda self, tokens, n_threads: (used.append(n_threads), real(self, tokens, 1)),
    )
    monkeypatch.setattr(engine, "n_threads", 5)
    for n in (1, 2, 4):
        run(engine, *(Row(seq, [1], 0) for seq in range(n)))
    assert used == [5, 2, 2, 1, 1, 1, 1]
    monkeypatch.setattr(engine, "n_threads", 1)
    run(engine, Row(0, [1], 0), Row(1, [1], 0))
    assert used[-2:] == [1, 1]


def test_no_more_threads_evaluate_than_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "available", lambda: 4)
    engine = opened(make.llama(tmp_path / "llama.gguf"), n_slots=4)
    used, most, running, lock = [], [0], [0], threading.Lock()
    real = library.Handle.eval

    def eval_(self: library.Handle, tokens: list[int], n_threads: int) -> None:
        with lock:
            running[0] += 1
            used.append(n_threads)
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        real(self, tokens, 1)
        with lock:
            running[0] -= 1

    monkeypatch.setattr(library.Handle, "eval", eval_)
    monkeypatch.setattr(engine, "n_threads", 4)
    for allowed, alone, beside in ((9, 4, 4), (3, 3, 3), (1, 1, 1), (2, 2, 2), (4, 4, 4)):
        engine.limit_threads(allowed)
        run(engine, Row(0, [1], 0))
        assert used == [alone]
        most[0] = 0
        run(engine, *(Row(seq, [1], 0) for seq in range(4)))
        assert most[0] == beside
        used.clear()
    engine.close()


def test_a_bad_row_among_good_ones_raises_and_the_next_step_works(engine: CTransformersEngine) -> None:
    with pytest.raises(EngineError):
        run(engine, Row(0, [1], 0), Row(1, [-5], 0), Row(2, [1], 0))
    run(engine, *(Row(i, [1], 0) for i in range(4)))


def test_an_error_in_one_row_is_raised_once_all_have_ended(
    engine: CTransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = library.Handle.eval

    def eval_(self: library.Handle, tokens: list[int], n_threads: int) -> None:
        if tokens == [9]:
            raise EngineError("broken")
        real(self, tokens, n_threads)

    monkeypatch.setattr(library.Handle, "eval", eval_)
    for bad in range(4):
        with pytest.raises(EngineError, match="broken"):
            run(engine, *(Row(i, [9 if i == bad else 1], 0) for i in range(4)))
        assert [engine.handle(i).n_past for i in range(4)] == [int(i != bad) for i in range(4)]


def test_logits_of_every_token_are_those_of_single_steps(engine: CTransformersEngine) -> None:
    ids = [1, *range(270, 270 + N_OUTPUTS - 1)]
    single = []
    for at, token in enumerate(ids):
        run(engine, Row(1, [token], at))
        single.append(logits(engine))
    run(engine, Row(0, ids, 0, Want.ALL), Row(2, [1, 2], 0))
    assert [logits(engine, 0, at) for at in range(len(ids))] == single
    assert logits(engine, 0) == logits(engine, 0, -1) == single[-1]
    assert logits(engine, 0, -2) == single[-2]
    assert len({tuple(row) for row in single}) == len(ids)


# -- sequences ---------------------------------------------------------------------------------------


def test_a_truncated_sequence_continues_as_if_it_was_never_longer(engine: CTransformersEngine) -> None:
    prompt = [1, *range(270, 290)]
    run(engine, Row(0, prompt, 0))
    expected = logits(engine)
    engine.eval([Row(0, [300, 301], len(prompt))])
    assert engine.truncate(0, 10) == 10
    with pytest.raises(EngineError):
        engine.eval([Row(0, [5], 11)])
    engine.eval([Row(0, prompt[10:], 10)])
    assert logits(engine) == expected
    assert engine.truncate(0, 10**6) == len(prompt)
    assert engine.truncate(0, 0) == 0


def test_an_unused_sequence_is_empty(folder: Path) -> None:
    fresh = opened(make.llama(folder / "fresh.gguf"))
    assert (fresh.truncate(1, 5), fresh.exact_prefix(1, 5, 9)) == (0, 0)
    assert fresh.truncate(0, 5) == 0  # the warm-up left nothing behind
    with pytest.raises(EngineError):
        fresh.logits(1)
    fresh.close()


def test_an_exact_prefix_follows_the_calls_of_the_library(engine: CTransformersEngine) -> None:
    run(engine, Row(0, [1] * 32, 0))
    engine.eval([Row(0, [2] * 8, 32)])
    assert engine.exact_prefix(0, 40, 41) == 40
    assert engine.exact_prefix(0, 40, 64) == 32
    engine.truncate(0, 30)
    assert engine.exact_prefix(0, 40, 64) == 30
    # Want.ALL evaluates token by token, with one library call each
    engine.truncate(0, 0)
    for at in (0, 8, 16, 24):
        engine.eval([Row(0, [1] * 8, at, Want.ALL)])
    assert engine.exact_prefix(0, 32, 32) == 0
    assert engine.exact_prefix(0, 31, 31) == 31


def prefill(engine: CTransformersEngine, seq: int, ids: list[int], begin: int = 0) -> list[float]:
    """Evaluates the ids from `begin` in chunks that end at multiples of 32. Returns the last logits."""
    engine.truncate(seq, begin)
    while begin < len(ids):
        end = begin - begin % 32 + 32
        engine.eval([Row(seq, ids[begin:end], begin)])
        begin = end
    return logits(engine)


def test_an_exact_prefix_is_bit_for_bit_a_fresh_prefill(engine: CTransformersEngine) -> None:
    long = [1, *range(270, 350)]
    short = [*long[:44], 7, 8, 9]
    for prompt, other, n_exact in ((long, short, 32), (short, long, 32), (short, [*short, 5], 46)):
        expected = prefill(engine, 1, prompt)
        prefill(engine, 0, other)
        n_equal = 44 if other[44:47] != prompt[44:47] else 46
        assert engine.exact_prefix(0, n_equal, len(prompt)) == n_exact
        assert prefill(engine, 0, prompt, n_exact) == expected


def test_what_the_engine_can_do(engine: CTransformersEngine) -> None:
    caps = engine.caps
    assert (caps.n_seq, caps.n_row, caps.n_batch, caps.n_outputs, caps.align) == (4, 32, 128, 8, 32)
    assert (caps.n_ctx, caps.n_kv) == (512, 2048)
    assert (caps.copies, caps.truncates) == (Copies.NONE, Truncates.FREELY)
    assert caps.bit_exact
    assert not (caps.saves or caps.pools or caps.whole_rows or caps.vision or caps.adapters)
    assert caps.longest_piece == len("\u2581a".encode()) - 2 > 1
    assert set(caps.step_cost) == {1}
    assert caps.step_cost[1] > 0
    for call in (lambda: engine.copy(0, 1, 1), lambda: engine.save(0), lambda: engine.load(0, b"")):
        with pytest.raises(EngineError, match="ctransformers cannot"):
            call()


# -- repeatable answers -----------------------------------------------------------------------------


def generate(
    scheduler: Scheduler, engine: CTransformersEngine, number: int, prompt: str, *, exact: bool
) -> tuple[str, int]:
    """Samples one answer and returns its text and the number of reused tokens."""
    body = wire.Generate(
        prompt=[wire.Special("bos"), wire.Text(prompt)],
        sampling=wire.Sampling(temperature=0.9, seed=5),
        max_tokens=70,
        exact=exact,
        ignore_eos=True,
    )
    events = finish(scheduler, submit(scheduler, engine, wire.Request(id=number, body=body)))
    accepted = next(e for e in events if isinstance(e, wire.Accepted))
    return text_of(events), accepted.n_cached


def idle(engine: CTransformersEngine) -> Scheduler:
    """Returns a scheduler with empty slots."""
    return Scheduler(engine, n_queue=8, clock=lambda: 0.0)


def test_equal_seeds_give_equal_text_for_any_cache_content(engine: CTransformersEngine) -> None:
    story = "once upon a time there was a small model that had to say the same thing twice and then again"
    long = story + ", for all who asked with the same seed and did not care what others had asked before them"
    expected = {text: generate(idle(engine), engine, 1, text, exact=True)[0] for text in (story, long)}
    scheduler = idle(engine)
    reused = 0
    for number, text in enumerate([story, long, story, story + " x", long, story, long, long], 2):
        said, n_cached = generate(scheduler, engine, number, text, exact=True)
        reused += n_cached
        if text in expected:
            assert said == expected[text]
    assert reused > 0


def test_an_inexact_request_reuses_its_whole_prefix(
    engine: CTransformersEngine,
) -> None:
    scheduler = idle(engine)
    prompt = "tell me something of what you have been told, so that it takes a while to read it all again"
    said, _ = generate(scheduler, engine, 1, prompt, exact=False)
    _, n_cached = generate(scheduler, engine, 2, prompt, exact=False)
    assert n_cached == len(engine.tokenize(prompt))
    assert said


# -- kinds of models -----------------------------------------------------------------------------------


def test_falcon(folder: Path) -> None:
    falcon = opened(make.falcon(folder / "falcon.gguf"))
    assert (falcon.info.architecture, falcon.info.bos_id, falcon.info.add_space_prefix) == (
        "falcon",
        -1,
        False,
    )
    text = "hell \u00e9 " * 900  # more than the byte-pair tokenizer takes in one call
    ids = falcon.tokenize(text)
    assert b"".join(falcon.piece(token) for token in ids).decode() == text
    assert falcon.info.special["<|endoftext|>"] not in falcon.tokenize("<|endoftext|>")
    falcon.eval([Row(0, ids[:32], 0)])
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
    gpt2.eval([Row(0, ids, 0)])
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
    monkeypatch.undo()  # the library of the real machine must be opened before a legacy header is read
    monkeypatch.setattr(facts, "odd_on_arm", lambda n: n % 64 != 0)
    for ftype in (2, 2007):  # Q4_0, and Q8_0 of the format's second version
        struct.pack_into("<i", whole, 4 + 4 * 5, ftype)
        (folder / "odd.bin").write_bytes(whole)
        with pytest.raises(ModelRefused, match=r"quantized rows of 96 values.*multiples of 64 on ARM"):
            opened(folder / "odd.bin", "gpt2")
    opened(make.gpt2_ggml(folder / "odd-f32.bin", n_embd=96), "gpt2").close()


def test_numbers_that_are_not_finite_are_found_at_load(folder: Path) -> None:
    path = make.llama(folder / "nan.gguf")
    whole = bytearray(path.read_bytes())
    header = gguf.read_header(path)
    # one scale of the output matrix, and a norm whose NaN the library's quantization hides as zeros
    for name, value in (
        ("output.weight", struct.pack("<H", 0x7E00)),
        ("output_norm.weight", struct.pack("<f", float("nan")) * 64),
    ):
        changed, at = bytearray(whole), header.data_at + header.tensors[name].offset
        changed[at : at + len(value)] = value
        path.write_bytes(changed)
        with pytest.raises(ModelRefused, match="nonsense"):
            opened(path)


def test_too_little_memory_is_an_error_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make.llama(folder / "memory.gguf")
    monkeypatch.setattr(memory, "available", lambda: 70_000_000)
    with pytest.raises(ModelRefused, match=r"a context of \d+ tokens fits \(--ctx-size \d+\)"):
        opened(path, n_ctx=100_000)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(ModelRefused, match="smaller"):
        opened(path)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="pip install"):
        library.library_path(False)


def test_the_package_itself_is_never_imported(engine: CTransformersEngine) -> None:
    import sys

    assert (engine.info.engine, engine.info.engine_version) == ("ctransformers", "0.2.27")
    assert "ctransformers" not in sys.modules


@pytest.mark.parametrize("n_batch", [1, 31, 33, 600])
def test_batches_are_whole_blocks_that_the_library_can_take(folder: Path, n_batch: int) -> None:
    made = opened(make.llama(folder / "batch.gguf"), n_batch=n_batch)
    assert made.caps.n_row % made.caps.align == 0
    assert 32 <= made.caps.n_row <= 512
    made.close()


def test_context_and_threads_of_a_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make.llama(folder / "load.gguf", n_ctx=8192)
    load = wire.Load(path=str(path), name="m", engine="ctransformers", n_slots=99, n_threads=2)
    made = open_engine(load)
    assert (made.info.n_ctx, made.info.n_ctx_train, made.n_threads, made.caps.n_seq) == (4096, 8192, 2, 30)
    made.close()
    monkeypatch.setattr(threads, "available", lambda: 2)  # one core is left to the server
    made = opened(path, n_ctx=64)
    assert (made.info.n_ctx, made.n_threads) == (64, 1)
    made.close()
