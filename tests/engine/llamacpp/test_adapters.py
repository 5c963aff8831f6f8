"""LoRA adapters over the real library: what they compute, which files are refused, and damaged ones."""

import math
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest

from tests import adapters, architectures, fixtures, llama_server
from tests.adapters import F32, Tensors
from tests.engine import bit_flips
from tests.engines import make
from tinyoai import gguf, wire
from tinyoai.engine.contract import EngineError, ModelRefused, Row
from tinyoai.engine.llamacpp import facts
from tinyoai.engine.llamacpp.engine import LlamaCppEngine
from tinyoai.engine.llamacpp.opening import open_engine
from tinyoai.wire import Adapter

IDS = list(range(10, 30))
EXACT = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"}
"""Options of a load that rounds nothing to 16 bits."""
ALPHA = 8.0
"""Of the adapters that `tests.adapters` writes."""


@pytest.fixture(autouse=True)
def library() -> None:
    """Without the library the tests are skipped, or fail with CI=true."""
    if not llama_server.installed():
        fixtures.absent("xllamacpp is not installed: run `make test`")


def opened(path: Path, *files: Path, **fields: Any) -> LlamaCppEngine:
    """Opens an engine with adapters that are named by their files' stems."""
    options = {"n_ctx": 256, "n_slots": 3, "n_batch": 64, "n_threads": 1} | fields
    wanted = tuple(wire.AdapterFile(name=file.stem, path=str(file)) for file in files)
    return open_engine(wire.Load(path=str(path), name="m", engine="llamacpp", adapters=wanted, **options))


def logprobs(engine: LlamaCppEngine, *used: Adapter, seq: int = 0) -> Any:
    """The log-probabilities after IDS."""
    engine.truncate(seq, 0)
    engine.eval([Row(seq, IDS, 0, adapters=used)])
    logits = np.array(engine.logits_list(0))
    return logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module's files."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A small llama in F32."""
    return adapters.in_f32(folder / "m.gguf", make.llama(folder / "q8.gguf"))


@pytest.fixture(scope="module")
def one(folder: Path, model: Path) -> Path:
    """An adapter of the small llama."""
    return adapters.adapter(folder / "one.gguf", model)


@pytest.fixture(scope="module")
def two(folder: Path, model: Path) -> Path:
    """Another adapter of it, for other matrices and of another rank."""
    return adapters.adapter(
        folder / "two.gguf", model, seed=2, rank=3, targets=("attn_k", "attn_q", "ffn_gate")
    )


@pytest.fixture(scope="module")
def engine(model: Path, one: Path, two: Path) -> Iterator[LlamaCppEngine]:
    """The small llama with both adapters."""
    made = opened(model, one, two, **EXACT)
    yield made
    made.close()


# -- what they compute -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0])
def test_an_adapter_computes_what_the_merged_model_computes(
    folder: Path, model: Path, engine: LlamaCppEngine, scale: float
) -> None:
    changes = adapters.pairs(gguf.read_header(model))
    merged = opened(
        adapters.in_f32(folder / "merged.gguf", model, changes, scale * ALPHA / adapters.RANK), **EXACT
    )
    expected = logprobs(merged)
    merged.close()
    assert np.abs(logprobs(engine, Adapter("one", scale)) - expected).max() < 1e-3
    assert np.abs(logprobs(engine) - expected).max() > 0.1


def test_two_adapters_add_up(folder: Path, model: Path, engine: LlamaCppEngine) -> None:
    header = gguf.read_header(model)
    first = adapters.in_f32(folder / "half.gguf", model, adapters.pairs(header), ALPHA / adapters.RANK)
    changes = adapters.pairs(header, seed=2, rank=3, targets=("attn_k", "attn_q", "ffn_gate"))
    merged = opened(adapters.in_f32(folder / "both.gguf", first, changes, 0.5 * ALPHA / 3), **EXACT)
    found = logprobs(engine, Adapter("one"), Adapter("two", 0.5))
    assert np.abs(found - logprobs(merged)).max() < 1e-3
    merged.close()


def test_an_adapter_of_the_embedding(folder: Path, model: Path) -> None:
    header = gguf.read_header(model)
    changes = adapters.for_embedding(header)
    file = adapters.write(
        folder / "embedding.gguf", adapters.values(header, adapter__lora__alpha=None), changes
    )
    changed = opened(model, file, **EXACT)
    merged = opened(adapters.in_f32(folder / "rows.gguf", model, changes), **EXACT)
    assert np.abs(logprobs(changed, Adapter("embedding")) - logprobs(merged)).max() < 1e-3
    assert np.abs(logprobs(changed) - logprobs(merged)).max() > 0.1
    changed.close()
    merged.close()


@pytest.mark.parametrize("name", architectures.DECODERS)
def test_every_architecture_takes_an_adapter(name: str, folder: Path) -> None:
    path = architectures.model(name)
    targets = ("attn_output", "ffn_down", "ssm_out")
    found = opened(path, adapters.adapter(folder / f"{name}.gguf", path, targets=targets))
    without, changed = logprobs(found), logprobs(found, Adapter(name))
    assert np.abs(without - changed).max() > 0.1
    assert (logprobs(found) == without).all()
    assert (logprobs(found, Adapter(name, 0.0)) == without).all()
    found.close()


def test_a_step_has_one_set(engine: LlamaCppEngine) -> None:
    for seq in (0, 1):
        engine.truncate(seq, 0)
    with pytest.raises(EngineError, match="different LoRA adapters"):
        engine.eval([Row(0, IDS, 0, adapters=(Adapter("one"),)), Row(1, IDS, 0)])
    for wrong in (Adapter("three"), Adapter("one", math.nan)):
        with pytest.raises(EngineError, match="there is no LoRA adapter"):
            engine.eval([Row(0, IDS, 0, adapters=(wrong,))])
    before = logprobs(engine, Adapter("two"))
    with pytest.raises(EngineError):
        logprobs(engine, Adapter("one"), Adapter("three"))
    assert (logprobs(engine, Adapter("two")) == before).all()


def test_the_engine_says_what_it_has(engine: LlamaCppEngine) -> None:
    assert engine.caps.adapters
    assert engine.info.adapters == (Adapter("one", 1.0), Adapter("two", 1.0))


def test_the_estimate_counts_the_files(model: Path, one: Path) -> None:
    load = wire.Load(path=str(model), name="m", engine="llamacpp", n_ctx=256)
    hparams, size = facts.hparams(gguf.read_header(model)), one.stat().st_size
    with_one = wire.Load(
        path=str(model),
        name="m",
        engine="llamacpp",
        n_ctx=256,
        adapters=(wire.AdapterFile(name="one", path=str(one), size=size),),
    )
    assert facts.estimate(hparams, 0, with_one).total - facts.estimate(hparams, 0, load).total == size


# -- against llama.cpp's own server ------------------------------------------------------------------------


def test_llama_server_gives_the_same_tokens_and_probabilities(folder: Path) -> None:
    path = fixtures.require(fixtures.smollm2(), "SmolLM2-135M-Instruct")
    files = [adapters.adapter(folder / f"smol{i}.gguf", path, seed=i, spread=0.1) for i in (1, 2)]
    used = [{"id": 0, "scale": 0.5}, {"id": 1, "scale": -0.25}]
    none = [{"id": i, "scale": 0.0} for i in range(2)]  # to this server an empty list means its defaults
    own = opened(path, *files)
    ids = own.encode([wire.Text("The capital of France is")])
    with llama_server.llama_server(path, n_ctx=256, n_batch=64, adapters=files) as server:
        answers = [server.complete(ids, 16, lora=used), server.complete(ids, 16, lora=none)]
    chosen = (Adapter("smol1", 0.5), Adapter("smol2", -0.25))
    for answer, applied in zip(answers, (chosen, ()), strict=True):
        own.truncate(0, 0)
        row = list(ids)
        for token, entry in zip(answer["tokens"], answer["completion_probabilities"], strict=True):
            own.eval([Row(0, row, own._n_past[0], adapters=applied)])
            logits = np.array(own.logits_list(0))
            logs = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
            assert int(logits.argmax()) == token
            for top in entry["top_logprobs"]:
                assert abs(logs[top["id"]] - top["logprob"]) < 1e-3
            row = [token]
    assert answers[0]["tokens"] != answers[1]["tokens"]
    own.close()


# -- files -------------------------------------------------------------------------------------------------


def tied(path: Path, model: Path) -> Path:
    """Writes a model whose last matrix is the embedding."""
    header, raw = gguf.read_header(model), model.read_bytes()
    kept = Tensors()
    for name, tensor in header.tensors.items():
        begin = header.data_at + tensor.offset
        if name != "output.weight":
            kept[name] = tensor.shape, tensor.type, raw[begin : begin + tensor.size]
    return adapters.write(path, architectures.metadata(model), kept)


def without(tensors: Tensors, name: str) -> Tensors:
    """All tensors but one."""
    return {key: value for key, value in tensors.items() if key != name}


def reshaped(tensors: Tensors, name: str, *shape: int) -> Tensors:
    """With another shape of one tensor."""
    return tensors | {name: (shape, F32, bytes(4 * math.prod(shape)))}


Q, DOWN = "blk.0.attn_q.weight", "blk.1.ffn_down.weight"
DOUBLE = struct.pack("<Id", 12, 8.0)
NORM: Tensors = {"blk.0.attn_norm.weight": ((64,), F32, bytes(256))}
OF_NORM: Tensors = {
    "blk.0.attn_norm.weight.lora_a": ((64, 4), F32, bytes(1024)),
    "blk.0.attn_norm.weight.lora_b": ((4, 1), F32, bytes(16)),
}
Change = Callable[[Tensors], Tensors]


@pytest.mark.parametrize(
    ("metadata", "change", "words"),
    [
        ({"general__type": "model"}, None, "is not a LoRA adapter"),
        ({"general__type": None}, None, "is not a LoRA adapter"),
        ({"general__type": 7}, None, "is not a LoRA adapter"),
        ({"adapter__type": "control"}, None, "is not a LoRA adapter"),
        ({"adapter__type": None}, None, "is not a LoRA adapter"),
        ({"general__architecture": "qwen2"}, None, "is for qwen2 models and this is a llama model"),
        ({"general__architecture": None}, None, "is for unnamed models"),
        ({"adapter__lora__alpha": DOUBLE}, None, "no usable adapter.lora.alpha"),
        ({"adapter__lora__alpha": 8}, None, "no usable adapter.lora.alpha"),
        ({"adapter__lora__alpha": "8"}, None, "no usable adapter.lora.alpha"),
        ({"adapter__lora__alpha": math.nan}, None, "no usable adapter.lora.alpha"),
        ({"adapter__lora__alpha": math.inf}, None, "no usable adapter.lora.alpha"),
        ({"adapter__lora__alpha": 1e9}, None, "no usable adapter.lora.alpha"),
        ({"general__alignment": 4}, None, "aligns its tensors to 4 bytes"),
        ({"adapter__alora__invocation_tokens": 1}, None, "is an activated LoRA"),
        ({}, lambda t: {}, "has 0 tensors"),
        ({}, lambda t: without(t, f"{Q}.lora_a"), "only one of the two matrices"),
        ({}, lambda t: without(t, f"{Q}.lora_b"), "only one of the two matrices"),
        ({}, lambda t: t | NORM, "no part of a LoRA pair"),
        ({}, lambda t: t | OF_NORM, "cannot change by an adapter"),
        ({}, lambda t: {k.replace("blk.1.", "blk.7."): v for k, v in t.items()}, "this model does not have"),
        ({}, lambda t: {k.replace(".weight.", ".weight.lora_a."): v for k, v in t.items()}, "does not have"),
        ({}, lambda t: reshaped(t, f"{Q}.lora_a", 32, 4), "do not fit the model's"),
        ({}, lambda t: reshaped(t, f"{Q}.lora_a", 64, 3), "do not fit the model's"),
        ({}, lambda t: reshaped(t, f"{Q}.lora_b", 4, 63), "do not fit the model's"),
        ({}, lambda t: reshaped(t, f"{DOWN}.lora_b", 64), "do not fit the model's"),
        # llama.cpp looks at the first two sides, and ends over the others
        ({}, lambda t: reshaped(t, f"{DOWN}.lora_a", 128, 4, 2), "do not fit the model's"),
        ({}, lambda t: reshaped(t, f"{DOWN}.lora_b", 4, 64, 1, 2), "do not fit the model's"),
        ({}, lambda t: t | {f"{Q}.lora_a": ((64, 4), 26, bytes(1024))}, "in the type I32"),
        ({}, lambda t: t | {f"{Q}.lora_a": ((64, 4), 28, bytes(2048))}, "in the type F64"),
        ({}, lambda t: t | {"x" * 60 + ".lora_a": ((64, 4), F32, bytes(1024))}, "long name"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused_in_words(
    folder: Path, model: Path, metadata: dict[str, Any], change: Change | None, words: str
) -> None:
    header = gguf.read_header(model)
    tensors = adapters.pairs(header)
    path = folder / "wrong.gguf"
    adapters.write(path, adapters.values(header, **metadata), change(tensors) if change else tensors)
    reason = facts.supports_adapter(gguf.read_header(path), header)
    assert reason is not None
    assert words in reason
    with pytest.raises(ModelRefused, match=r"wrong\.gguf") as refused:
        opened(model, path)
    assert words in str(refused.value)


def test_the_embedding_of_a_tied_model_is_refused(folder: Path, model: Path) -> None:
    path = tied(folder / "tied.gguf", model)
    header = gguf.read_header(path)
    file = adapters.write(folder / "e.gguf", adapters.values(header), adapters.for_embedding(header))
    assert "last matrix too" in (facts.supports_adapter(gguf.read_header(file), header) or "")
    flipped = adapters.for_embedding(gguf.read_header(model))
    ranks = reshaped(flipped, "token_embd.weight.lora_b", 3, 64)
    file = adapters.write(folder / "r.gguf", adapters.values(header), ranks)
    reason = facts.supports_adapter(gguf.read_header(file), gguf.read_header(model))
    assert reason is not None
    assert "do not fit" in reason


def test_an_encoder_has_no_adapters(folder: Path) -> None:
    path = architectures.model("bert")
    file = adapters.adapter(folder / "bert.gguf", path, targets=("attn_q",))
    with pytest.raises(ModelRefused, match="generates no text"):
        opened(path, file)


def test_an_adapter_that_computes_nonsense_is_refused_at_load(folder: Path, model: Path) -> None:
    header = gguf.read_header(model)
    tensors = adapters.pairs(header)
    shape, kind, raw = tensors[f"{Q}.lora_b"]
    tensors[f"{Q}.lora_b"] = shape, kind, np.full(len(raw) // 4, np.nan, np.float32).tobytes()
    with pytest.raises(ModelRefused, match=r"nan\.gguf is damaged"):
        opened(model, adapters.write(folder / "nan.gguf", adapters.values(header), tensors))


def test_a_file_that_is_gone_or_cut_is_refused(folder: Path, model: Path, one: Path) -> None:
    with pytest.raises(ModelRefused, match="is not a regular file"):
        opened(model, folder / "gone.gguf")
    (folder / "cut.gguf").write_bytes(one.read_bytes()[:-64])
    with pytest.raises(ModelRefused, match="cut short"):
        opened(model, folder / "cut.gguf")


def test_quantized_adapters_are_applied(folder: Path, model: Path, engine: LlamaCppEngine) -> None:
    header = gguf.read_header(model)
    tensors = adapters.pairs(header)
    for name, (shape, _, raw) in tensors.items():
        kind = (
            reference.GGMLQuantizationType.Q8_0 if name.endswith("_a") else reference.GGMLQuantizationType.F16
        )
        values = np.frombuffer(raw, np.float32).reshape(shape[::-1])
        tensors[name] = shape, kind, reference.quants.quantize(values, kind).tobytes()
    found = opened(model, adapters.write(folder / "q.gguf", adapters.values(header), tensors))
    assert np.abs(logprobs(found, Adapter("q")) - logprobs(engine, Adapter("one"))).max() < 0.2
    assert np.abs(logprobs(found, Adapter("q")) - logprobs(engine)).max() > 0.5
    found.close()


TRY = """
import sys
from tinyoai import wire
from tinyoai.engine.contract import EngineError, Row
from tinyoai.engine.llamacpp.library import Library
from tinyoai.engine.llamacpp.opening import open_engine
from tinyoai.wire import Adapter, AdapterFile
library = Library()
model, *files = sys.argv[1:]
n = 0
for path in files:
    load = wire.Load(
        path=model, name="m", engine="llamacpp", n_ctx=64, n_slots=2, n_batch=16, n_threads=1,
        adapters=(AdapterFile(name="a", path=path),),
    )
    try:
        engine = open_engine(load, library)
        engine.eval([Row(0, list(range(16)), 0, adapters=(Adapter("a"),))])
        engine.close()
        n += 1
    except EngineError:
        pass
print("alive", n)
"""
"""Opens a model with each adapter and evaluates a row."""


def test_bit_flips_in_the_header_crash_no_process(model: Path, tmp_path: Path) -> None:
    header = gguf.read_header(model)

    def supports(adapter: gguf.Header) -> str | None:
        return facts.supports_adapter(adapter, header)

    # values of every kind, so that flips hit more than names and shapes
    values = adapters.values(
        header,
        general__name="a name" * 20,
        general__tags=struct.pack("<IIQ", 9, 8, 8) + 8 * architectures.text("tag"),
        general__numbers=struct.pack("<IIQ40I", 9, 4, 40, *range(40)),
        general__flags=struct.pack("<IIQ8?", 9, 7, 8, *[True] * 8),
    )
    sound = adapters.write(tmp_path / "sound", values, adapters.pairs(header, targets=("attn_q", "ffn_up")))
    accepted = bit_flips.accepted(sound, tmp_path, supports, n=2000, seed=7)
    assert len(accepted) > 50
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(model), *accepted[:100]],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("alive"), done.stderr[-2000:]
    assert int(done.stdout.split()[1]) > 10
