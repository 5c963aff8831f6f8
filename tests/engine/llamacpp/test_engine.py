"""The llama.cpp engine over the real library: what a row may be, KV sequences, interrupts, and crafted files."""

import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from tests import architectures, fixtures, llama_server
from tests.engine import bit_flips
from tests.engines import make
from tinyoai import gguf, wire
from tinyoai.engine import threads
from tinyoai.engine.contract import EngineError, Interrupted, ModelRefused, NoRoom, Row, Truncates, Want
from tinyoai.engine.llamacpp import facts
from tinyoai.engine.llamacpp.context import Context
from tinyoai.engine.llamacpp.engine import LlamaCppEngine
from tinyoai.engine.llamacpp.memory import SCORED_ROWS
from tinyoai.engine.llamacpp.opening import open_engine

IDS = list(range(10, 50))


@pytest.fixture(autouse=True)
def library() -> None:
    """Without the library the tests are skipped, or fail with CI=true."""
    if not llama_server.installed():
        fixtures.absent("xllamacpp is not installed: run `make test`")


def opened(path: Path, **fields: Any) -> LlamaCppEngine:
    """Opens an engine with few slots."""
    options = {"n_ctx": 256, "n_slots": 3, "n_batch": 32, "n_threads": 1} | fields
    return open_engine(wire.Load(path=str(path), name="m", engine="llamacpp", **options))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama file."""
    return make.llama(tmp_path_factory.mktemp("llamacpp") / "llama.gguf")


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[LlamaCppEngine]:
    """The engine of a small llama."""
    made = opened(path)
    yield made
    made.close()


def run(engine: LlamaCppEngine, *rows: Row) -> None:
    """Runs one step, in which each row continues its sequence at its position."""
    for row in rows:
        engine.truncate(row.seq, row.pos)
    engine.eval(rows)


def logits(engine: LlamaCppEngine, row: int = 0, at: int = -1) -> list[float]:
    """Returns a copy of a row's logits in the last eval."""
    return list(engine.logits(row, at)[0 : engine.info.n_vocab])


def states(engine: LlamaCppEngine, row: int = 0) -> list[float]:
    """Returns the hidden states of a row in the last eval."""
    return list(memoryview(engine.embedding(row)).cast("B").cast("f"))


# -- rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [Row(0, [], 0)],
        [Row(0, [-1], 0)],
        [Row(0, [10**6], 0)],
        [Row(0, [True], 0)],
        [Row(0, [1.5], 0)],  # type: ignore[list-item]
        [Row(-1, [5], 0)],
        [Row(3, [5], 0)],
        [Row(0, [5], 1)],
        [Row(0, [5], -1)],
        [Row(0, [5] * 33, 0)],
        [Row(0, [5] * (SCORED_ROWS + 1), 0, Want.ALL)],
        [Row(0, [5] * (SCORED_ROWS + 1), 0, Want.EMBEDDING)],
        [Row(0, [5], 0), Row(0, [6], 0)],
        [Row(0, [5], 0, adapters=(wire.Adapter("x"),))],
        [Row(i, [5] * SCORED_ROWS, 0, Want.ALL) for i in range(2)],
        [Row(0, [5] * 32, 0), Row(1, [5] * 32, 0)],
    ],
    ids=str,
)
def test_rows_over_which_the_library_would_end_the_process(engine: LlamaCppEngine, rows: list[Row]) -> None:
    for seq in range(3):
        engine.truncate(seq, 0)
    with pytest.raises(EngineError):
        engine.eval(rows)
    run(engine, Row(0, [5], 0))
    assert len(logits(engine)) == engine.info.n_vocab


def test_positions_beyond_the_context_are_refused(path: Path) -> None:
    engine = opened(path, n_ctx=32, n_slots=1)
    engine.eval([Row(0, [5] * 32, 0)])
    with pytest.raises(EngineError, match="32 tokens"):
        engine.eval([Row(0, [5], 32)])
    engine.close()


def test_only_requested_outputs_of_the_last_eval_can_be_read(engine: LlamaCppEngine) -> None:
    run(engine, Row(0, IDS[:4], 0, Want.NOTHING), Row(1, IDS[:4], 0), Row(2, IDS[:4], 0, Want.ALL))
    for row, at in ((0, -1), (1, 0), (1, 4), (2, 4), (2, -5), (3, -1), (-1, -1)):
        with pytest.raises(EngineError):
            engine.logits(row, at)
    with pytest.raises(EngineError):
        engine.embedding(1)
    assert logits(engine, 1) == pytest.approx(logits(engine, 2, 3), abs=1e-4)
    with pytest.raises(EngineError):
        engine.eval([Row(0, [], 4)])
    with pytest.raises(EngineError):  # a failed eval has no outputs
        engine.logits(1)


def test_logits_of_every_token_are_those_of_single_steps(engine: LlamaCppEngine) -> None:
    run(engine, Row(0, IDS[:8], 0, Want.ALL))
    together = [logits(engine, 0, at) for at in range(8)]
    for at in range(8):
        run(engine, Row(1, [IDS[at]], at))
        assert logits(engine) == pytest.approx(together[at], abs=1e-3)


def test_states_beside_logits_are_those_of_a_row_alone(engine: LlamaCppEngine) -> None:
    run(engine, Row(1, IDS[:6], 0, Want.EMBEDDING))
    alone = states(engine)
    assert len(alone) == 6 * engine.info.n_embd_out
    run(engine, Row(0, IDS[:9], 0))
    expected = logits(engine)
    run(engine, Row(0, IDS[:9], 0), Row(1, IDS[:6], 0, Want.EMBEDDING), Row(2, IDS[:9], 0))
    assert states(engine, 1) == pytest.approx(alone, abs=1e-4)
    assert logits(engine, 0) == pytest.approx(expected, abs=1e-3)
    assert logits(engine, 2) == pytest.approx(expected, abs=1e-3)
    run(engine, Row(1, IDS[6:8], 6))  # both sequences go on
    run(engine, Row(2, IDS[:8], 0))


# -- sequences -----------------------------------------------------------------------------------------


def test_a_truncated_sequence_continues_as_if_it_was_never_longer(engine: LlamaCppEngine) -> None:
    run(engine, Row(0, IDS[:20], 0), Row(1, IDS[:10], 0))
    assert engine.truncate(0, 10) == 10
    engine.eval([Row(0, IDS[30:34], 10), Row(1, IDS[30:34], 10)])
    # the order of the cells changes sums a little
    assert logits(engine, 0) == pytest.approx(logits(engine, 1), abs=0.05)
    assert max(logits(engine)) - min(logits(engine)) > 1
    assert engine.truncate(0, 99) == 14
    assert engine.truncate(0, -5) == 0
    assert engine.truncate(0, 3) == 0


def test_a_copied_prefix_continues_like_its_source(engine: LlamaCppEngine) -> None:
    run(engine, Row(0, IDS[:20], 0), Row(1, IDS[25:35], 0))
    engine.copy(0, 1, 12)
    engine.truncate(0, 12)
    engine.eval([Row(0, [7], 12), Row(1, [7], 12)])
    assert logits(engine, 0) == pytest.approx(logits(engine, 1), abs=1e-4)
    with pytest.raises(EngineError):
        engine.copy(0, 2, 14)


def test_a_saved_sequence_loads_into_another(engine: LlamaCppEngine) -> None:
    run(engine, Row(0, IDS[:20], 0))
    state = engine.save(0)
    engine.eval([Row(0, [7], 20)])
    expected = logits(engine)
    assert engine.load(2, state)
    engine.eval([Row(2, [7], 20)])
    assert logits(engine) == expected
    assert not engine.load(2, state[: len(state) // 2])
    assert not engine.load(2, b"")
    run(engine, Row(2, [7], 0))  # empty, and usable


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in architectures.DECODERS
        if "hybrid" in n or n in ("lfm2", "jamba", "granitehybrid", "falcon-h1", "mamba")
    ],
)
def test_a_recurrent_model_goes_back_to_its_beginning_alone(name: str) -> None:
    engine = opened(architectures.model(name))
    assert engine.caps.truncates is Truncates.NEVER
    run(engine, Row(0, IDS[:12], 0))
    expected = logits(engine)
    engine.copy(0, 1, 12)
    engine.eval([Row(0, [7], 12), Row(1, [7], 12)])
    assert logits(engine, 0) == pytest.approx(logits(engine, 1), abs=1e-3)
    assert engine.truncate(0, 5) == 0
    engine.eval([Row(0, IDS[:12], 0)])
    assert logits(engine) == pytest.approx(expected, abs=1e-3)
    engine.close()


# -- interrupts ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 0], ids=["one thread", "chosen threads"])
def slow(request: pytest.FixtureRequest) -> Iterator[LlamaCppEngine]:
    """A model whose steps take long enough to interrupt them."""
    path = fixtures.require(fixtures.smollm2(), "SmolLM2-135M-Instruct")
    made = opened(path, n_ctx=2048, n_slots=2, n_batch=512, n_threads=request.param)
    yield made
    made.close()


def test_an_interrupt_from_another_thread_ends_a_step_and_changes_nothing(slow: LlamaCppEngine) -> None:
    run(slow, Row(0, IDS[:10], 0))
    slow.eval([Row(0, [7], 10)])
    expected = logits(slow)
    slow.truncate(0, 10)
    raised = 0
    for delay in (0.0, 0.01, 0.05, 0.1):
        timer = threading.Timer(delay, slow.interrupt)
        timer.start()
        try:
            slow.eval([Row(0, [5] * 500, 10), Row(1, [7] * 2, 0)])
        except Interrupted:
            raised += 1
        timer.join()
        slow.truncate(1, 0)
        assert slow.truncate(0, 10) == 10
    assert raised >= 3
    slow.eval([Row(0, [7], 10)])
    assert logits(slow) == pytest.approx(expected, abs=1e-2)


def test_a_step_ends_at_its_time(slow: LlamaCppEngine) -> None:
    slow.truncate(0, 0)
    with pytest.raises(Interrupted):
        slow.eval([Row(0, [5] * 500, 0)], time.monotonic() + 0.05)
    with pytest.raises(Interrupted):
        slow.eval([Row(0, [5] * 500, 0)], 0.001)  # long ago
    slow.eval([Row(0, [5] * 5, 0)], time.monotonic() + 1000)


# -- threads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_threads", [0, 4])
def test_no_more_threads_are_used_than_are_allowed(
    path: Path, monkeypatch: pytest.MonkeyPatch, n_threads: int
) -> None:
    monkeypatch.setattr(threads, "available", lambda: 4)
    used: list[int] = []
    engine = opened(path, n_threads=n_threads)
    real = Context.decode

    def decode(self: Context, rows: list[Row], n: int, *more: Any, **options: Any) -> None:
        used.append(n)
        real(self, rows, n, *more, **options)

    monkeypatch.setattr(Context, "decode", decode)
    for allowed in (1, 3, 9, 2):
        engine.limit_threads(allowed)
        used.clear()
        for pos in range(30):
            run(engine, Row(0, [5], pos))
        assert set(used) <= {1, min(4, allowed)}
        if n_threads:
            assert set(used) == {min(4, allowed)}
    engine.limit_threads(1)
    used.clear()
    begin = time.monotonic()
    while time.monotonic() < begin + 1.2:  # longer than the first pause between trials
        run(engine, Row(0, [5], 0))
    assert set(used) == {1}
    engine.close()


# -- files ---------------------------------------------------------------------------------------------


def test_settings_that_the_library_cannot_serve_are_refused(path: Path) -> None:
    with pytest.raises(ModelRefused, match="processors only; start without --gpu-layers"):
        opened(path, n_gpu_layers=1)
    with pytest.raises(ModelRefused, match=r"llama\.cpp cannot run"):
        opened(path, cache_type_v="q8_0", flash_attn="off")


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"])
def test_every_type_of_the_kv_cache_computes(path: Path, kind: str) -> None:
    engine = opened(path, cache_type_k=kind, cache_type_v=kind)
    engine.eval([Row(0, IDS[:20], 0)])
    assert all(map(math.isfinite, logits(engine)))
    engine.close()


@pytest.mark.parametrize("fields", [{"mmap": False}, {"mlock": True}, {"flash_attn": "on"}, {"n_batch": 1}])
def test_other_settings_compute_the_same(engine: LlamaCppEngine, path: Path, fields: dict[str, Any]) -> None:
    run(engine, Row(0, IDS[:1], 0))
    other = opened(path, **fields)
    other.eval([Row(0, IDS[:1], 0)])
    assert logits(other) == pytest.approx(logits(engine), abs=1e-2)
    other.close()


def test_numbers_that_are_not_finite_are_found_at_load(path: Path, tmp_path: Path) -> None:
    header = gguf.read_header(path)
    content = bytearray(path.read_bytes())
    at = header.data_at + header.tensors["output_norm.weight"].offset
    # an infinity: the quantized product turns a NaN into finite numbers
    content[at : at + 4] = b"\x00\x00\x80\x7f"
    broken = tmp_path / "nan.gguf"
    broken.write_bytes(content)
    with pytest.raises(ModelRefused, match="nonsense instead of logits"):
        opened(broken)


def test_the_reason_of_the_library_is_in_the_refusal(path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "key.gguf"
    broken.write_bytes(path.read_bytes().replace(b"layer_norm_rms_epsilon", b"layer_norm_xxx_epsilon"))
    with pytest.raises(ModelRefused) as refused:
        opened(broken)
    assert str(refused.value) == (
        f"llama.cpp cannot load {broken}: key not found in model: llama.attention.layer_norm_rms_epsilon; "
        "download it again or choose another model"
    )


TRY = """
import sys
from tinyoai import wire
from tinyoai.engine.contract import EngineError, Row
from tinyoai.engine.opening import open_engine
for path in sys.argv[1:]:
    print(path, file=sys.stderr, flush=True)
    try:
        engine = open_engine(wire.Load(path=path, name="m", engine="llamacpp", n_ctx=64, n_slots=1, n_threads=1))
        ids = engine.encode([wire.Text("hello"), wire.Markup("<|im_end|>x")])[:32] or [0]
        engine.eval([Row(0, ids, 0)])
        engine.close()
    except EngineError as error:
        assert "Traceback" not in str(error)
print("alive")
"""


def test_bit_flips_in_the_header_crash_no_process(path: Path, tmp_path: Path) -> None:
    accepted = bit_flips.accepted(path, tmp_path, facts.supports, n=600, seed=5)
    assert 60 < len(accepted) < 500
    done = subprocess.run(
        [sys.executable, "-c", TRY, *accepted[:80]], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "alive\n", done.stderr[-2000:]


def test_without_room_a_model_that_cannot_go_back_keeps_its_sequence() -> None:
    engine = opened(architectures.model("falcon-h1"), n_slots=1)
    n_cells = engine.caps.n_kv
    engine.caps = structs.replace(engine.caps, n_ctx=2 * n_cells)
    for at in range(0, n_cells, 32):
        run(engine, Row(0, [7] * 32, at))
    for _ in range(2):
        with pytest.raises(NoRoom):
            engine.eval([Row(0, [7], n_cells)])
    assert engine.truncate(0, n_cells) == n_cells
    engine.close()


def test_control_tokens_take_white_space_as_in_marked_text() -> None:
    engine = opened(architectures.model("phi3"))
    for text in ("\n hi", " hi ", "hi", "\n", ""):
        by_structure = engine.encode([wire.Special("<|user|>"), wire.Text(text), wire.Special("<|end|>")])
        assert by_structure == engine.encode([wire.Markup(f"<|user|>{text}<|end|>")]), text
    engine.close()
