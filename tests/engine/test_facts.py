"""The choice of an engine for a file, and memory estimates. No native code is loaded."""

import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine import bit_flips
from tests.engines import make
from tinyoai import gguf, wire
from tinyoai.config import options
from tinyoai.engine import facts
from tinyoai.engine.ctransformers import facts as ctransformers

LOAD = wire.Load(path="", name="m", engine="ctransformers", n_ctx=100, n_slots=2)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bytes of a small llama file."""
    return make.llama(tmp_path_factory.mktemp("facts") / "sound.gguf", n_embd=32, n_ff=64, n_layer=1)


def put(header: gguf.Header, key: str, value: object) -> None:
    """Sets a metadata value."""
    header.metadata[key] = value


def drop(header: gguf.Header, key: str) -> None:
    """Removes a metadata value."""
    del header.metadata[key]


def reshape(header: gguf.Header, name: str, shape: tuple[int, ...]) -> None:
    """Gives a tensor another shape."""
    header.tensors[name] = header.tensors[name]._replace(shape=shape)


def retype(header: gguf.Header, name: str, type_: int) -> None:
    """Gives a tensor another type."""
    header.tensors[name] = header.tensors[name]._replace(type=type_)


def byte_pair(header: gguf.Header) -> None:
    """Gives the header a byte-pair vocabulary like that of SmolLM2 and Llama 3: token types, no scores."""
    put(header, "tokenizer.ggml.model", "gpt2")
    put(header, "tokenizer.ggml.merges", [b"a b"])
    drop(header, "tokenizer.ggml.scores")


NEEDS_LLAMA_CPP = "the llamacpp engine newer ones"

REFUSALS: list[tuple[str, Callable[[gguf.Header], None], str]] = [
    ("a newer family", lambda h: put(h, "general.architecture", "qwen2"), "is a qwen2 model"),
    ("no architecture", lambda h: drop(h, "general.architecture"), "architecture"),
    ("no heads", lambda h: put(h, "llama.attention.head_count", 0), "head_count"),
    ("heads by layer", lambda h: put(h, "llama.attention.head_count", array("I", [2, 4])), "head_count"),
    ("no key-value heads", lambda h: put(h, "llama.attention.head_count_kv", 0), "head_count_kv"),
    ("heads that do not divide", lambda h: put(h, "llama.attention.head_count", 3), "heads"),
    ("a width of another type", lambda h: put(h, "llama.embedding_length", "32"), "embedding_length"),
    ("a width of true", lambda h: put(h, "llama.embedding_length", True), "embedding_length"),
    ("no layers", lambda h: drop(h, "llama.block_count"), "block_count"),
    ("more layers than tensors", lambda h: put(h, "llama.block_count", 2), "blk.1"),
    ("no context", lambda h: put(h, "llama.context_length", 0), "context_length"),
    ("epsilon", lambda h: put(h, "llama.attention.layer_norm_rms_epsilon", float("nan")), "epsilon"),
    ("another rotary width", lambda h: put(h, "llama.rope.dimension_count", 8), "rotary"),
    ("no vocabulary", lambda h: drop(h, "tokenizer.ggml.tokens"), "vocabulary"),
    ("an empty vocabulary", lambda h: put(h, "tokenizer.ggml.tokens", []), "vocabulary"),
    ("too few tokens", lambda h: h.metadata["tokenizer.ggml.tokens"].pop(), "scores"),
    ("too few scores", lambda h: h.metadata["tokenizer.ggml.scores"].pop(), "scores"),
    ("no token types", lambda h: drop(h, "tokenizer.ggml.token_type"), "token_type"),
    ("a byte token missing", lambda h: put_token(h, 20, b"x"), "byte tokens"),
    ("a byte-pair llama", byte_pair, "byte-pair vocabulary, as Llama 3"),
    ("an unknown tokenizer", lambda h: put(h, "tokenizer.ggml.model", "rwkv"), "'rwkv'"),
    ("bos beyond the vocabulary", lambda h: put(h, "tokenizer.ggml.bos_token_id", 10**6), "bos_token_id"),
    ("eos below the vocabulary", lambda h: put(h, "tokenizer.ggml.eos_token_id", -1), "eos_token_id"),
    ("a tensor missing", lambda h: h.tensors.pop("output.weight"), "output.weight"),
    ("a tensor of another shape", lambda h: reshape(h, "output.weight", (32, 5)), "output.weight"),
    ("a norm that is quantized", lambda h: retype(h, "output_norm.weight", 8), "output_norm.weight"),
    ("a small alignment", lambda h: setattr(h, "alignment", 4), "aligns"),
]


def put_token(header: gguf.Header, at: int, token: bytes) -> None:
    """Replaces a token of the vocabulary."""
    header.metadata["tokenizer.ggml.tokens"][at] = token


@pytest.mark.parametrize(("change", "words"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_ctransformers_refuses_files_that_would_crash_it(
    sound: Path, change: Callable[[gguf.Header], None], words: str
) -> None:
    header = gguf.read_header(sound)
    assert ctransformers.supports(header) is None
    change(header)
    reason = ctransformers.supports(header)
    assert reason is not None
    assert words in reason
    assert NEEDS_LLAMA_CPP in reason or words == "architecture"
    assert "damaged" not in reason


@pytest.mark.parametrize(
    ("type_", "name"), [(30, "BF16"), (20, "IQ4_NL"), (39, "MXFP4"), (1000, "type 1000")]
)
def test_tensor_types_that_ctransformers_does_not_know(sound: Path, type_: int, name: str) -> None:
    header = gguf.read_header(sound)
    retype(header, "output.weight", type_)
    reason = ctransformers.supports(header)
    assert reason is not None
    assert f"output.weight in the type {name}," in reason
    assert "Q8_0" in reason


def test_a_falcon_of_newer_converters_is_refused(tmp_path: Path) -> None:
    header = gguf.read_header(make.falcon(tmp_path / "falcon.gguf"))
    assert ctransformers.supports(header) is None
    put_token(header, 31, "\u0120".encode())
    assert "October 2023" in str(ctransformers.supports(header))


def test_rows_that_abort_the_library_on_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = gguf.read_header(make.llama(tmp_path / "odd.gguf", n_embd=96))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert ctransformers.supports(header) is None
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    reason = str(ctransformers.supports(header))
    assert "rows of 96 values in Q8_0" in reason
    assert "multiples of 64 on ARM" in reason


# -- the choice ----------------------------------------------------------------------------------------


def rename(header: gguf.Header, arch: str) -> None:
    """Makes the file one of another family, with the same hyperparameters."""
    for key in [key for key in header.metadata if key.startswith("llama.")]:
        put(header, key.replace("llama", arch, 1), header.metadata.pop(key))
    put(header, "general.architecture", arch)


def install(monkeypatch: pytest.MonkeyPatch, *, there: bool) -> None:
    """Makes the library of llama.cpp there or not."""
    changed = facts.ENGINES["llamacpp"]._replace(installed=lambda: there)
    monkeypatch.setitem(facts.ENGINES, "llamacpp", changed)


def test_the_best_engine_that_is_installed_is_chosen(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = gguf.read_header(sound)
    install(monkeypatch, there=False)
    assert facts.choose(header) == facts.choose(header, "ctransformers") == "ctransformers"
    assert facts.installed() == "ctransformers"
    install(monkeypatch, there=True)
    assert facts.choose(header) == facts.choose(header, "llamacpp") == "llamacpp"
    assert facts.choose(header, "ctransformers") == "ctransformers"
    assert facts.installed() == "llamacpp+ctransformers"
    with pytest.raises(gguf.Unsupported, match=r"sound\.gguf is a model file, and the fake engine runs none"):
        facts.choose(header, "fake")


def test_a_newer_file_needs_the_extra(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = gguf.read_header(sound)
    rename(header, "qwen3")
    install(monkeypatch, there=True)
    assert facts.choose(header) == "llamacpp"
    install(monkeypatch, there=False)
    for engine in ("auto", "llamacpp"):
        with pytest.raises(gguf.Unsupported) as caught:
            facts.choose(header, engine)
        assert str(caught.value) == (
            f"{sound} is a qwen3 model, which the llamacpp engine runs; install it with: "
            'pip install "tinyoai[llamacpp]"'
        )
    with pytest.raises(gguf.Unsupported) as caught:
        facts.choose(header, "ctransformers")
    assert str(caught.value) == (
        f"{sound} is a qwen3 model; ctransformers runs llama (Llama 2, Mistral) and falcon files of 2023, "
        "and the llamacpp engine newer ones"
    )
    with pytest.raises(gguf.Unsupported, match="qwen3"):
        ctransformers.require(header)


def test_legacy_files_have_an_engine_too() -> None:
    assert facts.choose_legacy("m.bin") == facts.choose_legacy("m.bin", "ctransformers") == "ctransformers"
    with pytest.raises(gguf.Unsupported, match="legacy"):
        facts.choose_legacy("m.bin", "fake")


def test_the_table_has_the_engines_of_the_command_line() -> None:
    assert set(facts.ENGINES) == set(options.ENGINES) - {facts.AUTO}


def test_facts_load_no_native_code() -> None:
    code = (
        "import sys; from tinyoai.engine import facts; "
        "print([m for m in ('ctypes', '_cffi_backend', 'numpy', 'tinyoai._native') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- memory ----------------------------------------------------------------------------------------------


def test_an_estimate_is_of_the_file_the_cache_and_scratch(tmp_path: Path) -> None:
    header = gguf.read_header(make.llama(tmp_path / "m.gguf", n_layer=3, n_embd=64, n_head=4, n_ctx=128))
    hparams = ctransformers.hparams(header)
    assert (hparams.n_layer, hparams.n_embd, hparams.n_head, hparams.n_head_kv) == (3, 64, 4, 4)
    assert (hparams.n_ff, hparams.n_vocab) == (128, len(header.metadata["tokenizer.ggml.tokens"]))
    estimate = facts.ENGINES["ctransformers"].estimate
    small = estimate(hparams, header.file_size, LOAD)
    large = estimate(hparams, header.file_size, wire.Load(path="", name="m", engine="", n_ctx=200, n_slots=2))
    assert small.fixed == large.fixed > header.file_size
    # at least two F16 numbers of the model's width for each layer, position and slot
    assert large.total - small.total >= 100 * 2 * 3 * 64 * 2 * 2


def test_without_hyperparameters_the_file_counts_alone() -> None:
    for name in ("ctransformers", "fake"):
        estimate = facts.ENGINES[name].estimate(None, 5000, LOAD)
        assert (estimate.total, estimate.per_token) == (facts.WORKER_BYTES + 5000, 0)


def test_the_largest_context_fits_and_the_next_step_does_not() -> None:
    estimate = facts.MemoryEstimate(fixed=1000, per_token=10, n_ctx=4096)
    assert estimate.largest_context(1000 + 10 * 100) == 96
    assert estimate.largest_context(1000 + 10 * 96) == 96
    assert estimate.largest_context(1000 + 10 * 96 - 1) == 64
    assert estimate.largest_context(999) == 0
    assert facts.MemoryEstimate(fixed=1000, per_token=0, n_ctx=0).largest_context(10**9) == 0


def test_a_shortage_names_sizes_and_a_remedy() -> None:
    estimate = facts.MemoryEstimate(fixed=10**6, per_token=10**6, n_ctx=4096)
    assert estimate.shortage(101_000_000, 3) == (
        "needs about 4097 MB with 4096 tokens of context and 3 slots, and 101 MB are available; "
        "a context of 96 tokens fits (--ctx-size 96), or fewer slots with --parallel"
    )
    assert estimate.shortage(1000, 3).endswith("choose a smaller or more quantized model")
    assert "context" not in facts.MemoryEstimate(10**6, 0, 0).shortage(1000, 3)


# -- accepted files are harmless -------------------------------------------------------------------------


TRY = """
import sys
from tinyoai import wire
from tinyoai.engine.contract import EngineError, Row
from tinyoai.engine.opening import open_engine
for path in sys.argv[1:]:
    try:
        engine = open_engine(wire.Load(path=path, name="m", engine="ctransformers", n_ctx=64, n_slots=1, n_threads=1))
        engine.truncate(0, 0)
        engine.eval([Row(0, engine.tokenize("hello")[:32], 0)])
        engine.close()
    except EngineError as error:
        assert "Traceback" not in str(error)
print("alive")
"""


def test_bit_flips_in_the_header_crash_no_process(sound: Path, tmp_path: Path) -> None:
    accepted = bit_flips.accepted(sound, tmp_path, ctransformers.supports, n=600, seed=3)
    assert 60 < len(accepted) < 500
    done = subprocess.run(
        [sys.executable, "-c", TRY, *accepted[:60]], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "alive\n", done.stderr[-2000:]
