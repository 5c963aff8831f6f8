"""Which files llama.cpp can run, which context window it takes, and how much memory. No native code is loaded."""

import importlib.util
import os
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from tests import fixtures
from tests.engines import make
from tinyoai import gguf, wire
from tinyoai.config import options
from tinyoai.engine import facts
from tinyoai.engine.llamacpp import facts as llamacpp
from tinyoai.engine.llamacpp import memory
from tinyoai.engine.llamacpp.architectures import DECODERS, ENCODERS, REFUSED

LOAD = wire.Load(path="", name="m", engine="llamacpp", n_ctx=1024, n_slots=2, n_batch=64)
GB = 10**9


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama file."""
    return make.llama(tmp_path_factory.mktemp("facts") / "sound.gguf", n_embd=64, n_ff=96, n_layer=3)


def smollm2() -> gguf.Header:
    """The header of SmolLM2."""
    return gguf.read_header(fixtures.require(fixtures.smollm2(), "SmolLM2-135M-Instruct"))


def put(header: gguf.Header, **values: Any) -> None:
    """Sets metadata values of the tokenizer."""
    header.metadata |= {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def set_value(header: gguf.Header, key: str, value: object) -> None:
    """Sets a hyperparameter."""
    header.metadata[f"{header.architecture}.{key}"] = value


def rwkv(header: gguf.Header, read: set[int]) -> gguf.Header:
    """The file with a vocabulary of RWKV that has tokens for these bytes."""
    tokens = [b"<s>"] + [repr(bytes([byte]))[2:-1].encode() for byte in sorted(read)]
    n = len(header.metadata["tokenizer.ggml.tokens"])
    put(header, model="rwkv", tokens=tokens + [b"more %d" % i for i in range(n - len(tokens))])
    return header


def rename(header: gguf.Header, arch: str) -> gguf.Header:
    """The file as one of another family with the same hyperparameters."""
    old = header.architecture
    for key in [key for key in header.metadata if key.startswith(f"{old}.")]:
        header.metadata[key.replace(old, arch, 1)] = header.metadata.pop(key)
    header.metadata["general.architecture"] = arch
    return header


def byte_pair(header: gguf.Header, **values: Any) -> None:
    """A byte-pair vocabulary as Llama 3 has: token types, merges and no scores."""
    put(header, model="gpt2", pre="llama-bpe", merges=[b"a b"], **values)
    header.metadata.pop("tokenizer.ggml.scores")


def retype(header: gguf.Header, name: str, type_: int) -> None:
    """Gives a tensor another type."""
    header.tensors[name] = header.tensors[name]._replace(type=type_)


def experts(header: gguf.Header, n: int, used: int, **groups: int) -> None:
    """Gives the model experts."""
    set_value(header, "expert_count", n)
    set_value(header, "expert_used_count", used)
    for key, value in groups.items():
        set_value(header, key, value)


def duplicate(header: gguf.Header) -> None:
    """Two equal tokens."""
    header.metadata["tokenizer.ggml.tokens"][300] = header.metadata["tokenizer.ggml.tokens"][301]


REFUSALS: list[tuple[str, Callable[[gguf.Header], object], str]] = [
    ("an unknown family", lambda h: rename(h, "llama9"), "is a llama9 model, which this version"),
    ("no family", lambda h: h.metadata.pop("general.architecture"), "names no architecture"),
    (
        "a reranker without a head",
        lambda h: set_value(rename(h, "bert"), "pooling_type", 4),
        "has no cls.output.weight",
    ),
    ("an encoder with a decoder", lambda h: rename(h, "t5"), "an encoder with a decoder"),
    ("a diffusion model", lambda h: rename(h, "dream"), "is a diffusion model"),
    ("a draft head", lambda h: rename(h, "eagle3"), "draft head of another model"),
    ("a speech model", lambda h: rename(h, "pockettts"), "is a speech model"),
    ("weights only", lambda h: h.tensors.clear(), "no weights"),
    ("no vocabulary", lambda h: h.metadata.pop("tokenizer.ggml.tokens"), "no vocabulary"),
    ("an unknown tokenizer", lambda h: put(h, model="magic"), "of the kind 'magic'"),
    ("two equal tokens", duplicate, "two equal tokens"),
    ("scores as text", lambda h: put(h, scores=[b"1"] * 600), "scores that do not fit"),
    ("too few scores", lambda h: put(h, scores=array("f", [1.0])), "scores that do not fit"),
    (
        "token types of 8 bits",
        lambda h: put(h, token_type=array("b", [1] * 600)),
        "token_type that do not fit",
    ),
    ("bos beyond the vocabulary", lambda h: put(h, bos_token_id=10**6), "bos_token_id outside"),
    ("a separator below it", lambda h: put(h, seperator_token_id=-1), "seperator_token_id outside"),
    ("no merges", lambda h: byte_pair(h) or h.metadata.pop("tokenizer.ggml.merges"), "without merges"),
    ("merges as numbers", lambda h: byte_pair(h) or put(h, merges=array("i", [1])), "without merges"),
    ("raw bytes", lambda h: byte_pair(h) or put_token(h, 300, b"\x80"), "before October 2023"),
    ("a byte token missing", lambda h: put_token(h, 200, b"xyz"), "without all byte tokens"),
    ("a byte that RWKV cannot read", lambda h: rwkv(h, set(range(256)) - {13}), "without all byte tokens"),
    ("no context length", lambda h: set_value(h, "context_length", 0), "context_length"),
    ("a width of text", lambda h: set_value(h, "embedding_length", "64"), "embedding_length"),
    ("too many layers", lambda h: set_value(h, "block_count", 513), "block_count"),
    ("only draft layers", lambda h: set_value(h, "nextn_predict_layers", 3), "nextn_predict_layers"),
    ("another width", lambda h: set_value(h, "embedding_length", 128), "token_embd.weight"),
    (
        "a token more",
        lambda h: h.metadata["tokenizer.ggml.tokens"].append(b"new") or fit(h),
        "token_embd.weight",
    ),
    ("no embeddings", lambda h: h.tensors.pop("token_embd.weight"), "token_embd.weight"),
    (
        "heads for keys that do not divide",
        lambda h: set_value(h, "attention.head_count_kv", 3),
        "attention heads",
    ),
    (
        "negative heads",
        lambda h: set_value(h, "attention.head_count", array("i", [2, -1, 2])),
        "attention heads",
    ),
    (
        "heads of too few layers",
        lambda h: set_value(h, "attention.head_count", array("i", [2])),
        "head_count",
    ),
    ("heads as floats", lambda h: set_value(h, "attention.head_count", array("f", [2.0] * 3)), "head_count"),
    ("an odd key length", lambda h: set_value(h, "attention.key_length", -5), "key_length"),
    ("more experts used than there", lambda h: experts(h, 4, 5), "4 experts, 5 of them used"),
    ("experts used without any", lambda h: experts(h, 0, 2), "0 experts, 2 of them used"),
    ("experts without use", lambda h: experts(h, 4, 0), "experts"),
    ("too many experts", lambda h: experts(h, 2000, 2), "expert_count"),
    ("groups that do not divide", lambda h: experts(h, 8, 2, expert_group_count=3), "experts"),
    ("an unknown rope scaling", lambda h: set_value(h, "rope.scaling.type", "bent"), "rope.scaling.type"),
    (
        "an infinite epsilon",
        lambda h: set_value(h, "attention.layer_norm_rms_epsilon", float("inf")),
        "epsilon",
    ),
    ("a type of a newer ggml", lambda h: retype(h, "output.weight", 1000), "number 1000"),
    (
        "a type that was removed",
        lambda h: retype(h, "output.weight", 31),
        "Q4_0_4_4, which ggml no longer reads",
    ),
    ("a small alignment", lambda h: setattr(h, "alignment", 4), "aligns"),
    ("a large alignment", lambda h: setattr(h, "alignment", 8192), "aligns"),
    ("a long name", lambda h: long_name(h), "a long name"),
]


def fit(header: gguf.Header) -> None:
    """Gives the vocabulary scores and types of its length."""
    n = len(header.metadata["tokenizer.ggml.tokens"])
    put(header, scores=array("f", [0.0] * n), token_type=array("i", [1] * n))


def long_name(header: gguf.Header) -> None:
    """A tensor with a longer name than ggml stores."""
    header.tensors["x" * 64] = header.tensors["output.weight"]._replace(name="x" * 64)


def put_token(header: gguf.Header, at: int, token: bytes) -> None:
    """Replaces a token of the vocabulary."""
    header.metadata["tokenizer.ggml.tokens"][at] = token


@pytest.mark.parametrize(("change", "words"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_it_refuses_what_llama_cpp_would_end_over(
    sound: Path, change: Callable[[gguf.Header], object], words: str
) -> None:
    header = gguf.read_header(sound)
    assert llamacpp.supports(header) is None
    change(header)
    reason = llamacpp.supports(header)
    assert reason is not None
    assert words in reason
    assert "damaged" not in reason


def test_valid_forms_that_are_rare(sound: Path) -> None:
    for change in (
        byte_pair,
        lambda h: rename(h, "qwen3"),
        lambda h: set_value(h, "attention.head_count_kv", array("I", [0, 1, 2])),
        lambda h: experts(h, 8, 2, expert_group_count=4, expert_group_used_count=2),
        lambda h: retype(h, "output.weight", 39),
        lambda h: h.metadata.pop("tokenizer.ggml.scores"),
        lambda h: h.metadata.pop("llama.attention.head_count_kv"),
        lambda h: setattr(h, "alignment", 4096),
    ):
        header = gguf.read_header(sound)
        change(header)
        assert llamacpp.supports(header) is None
        llamacpp.hparams(header)


def test_a_vocabulary_of_rwkv_passes(sound: Path) -> None:
    header = rwkv(gguf.read_header(sound), set(range(256)))
    assert llamacpp.supports(header) is None


def test_no_family_is_in_two_lists() -> None:
    assert not DECODERS & ENCODERS
    assert not (DECODERS | ENCODERS) & set(REFUSED)
    assert {"llama", "qwen3", "gemma3", "phi3", "gpt-oss", "lfm2"} <= DECODERS


def test_vocabularies_of_every_kind_pass() -> None:
    folder = fixtures.require(fixtures.vocabularies(), "the folder of vocabularies")
    paths = sorted(folder.glob("ggml-vocab-*.gguf"))
    assert len(paths) > 10
    for path in paths:
        reason = llamacpp.supports(gguf.read_header(path))
        assert reason == "has a vocabulary and no weights; name the model that it belongs to", path


def test_smollm2_is_described() -> None:
    header = smollm2()
    assert (header.architecture, header.quantization, header.role) == ("llama", "Q4_1", "model")
    assert header.metadata["tokenizer.ggml.model"] == "gpt2"
    assert header.value("context_length") == 8192
    assert "<|im_start|>" in header.metadata["tokenizer.chat_template"]
    assert llamacpp.supports(header) is None
    found = llamacpp.hparams(header)
    assert (found.n_layer, found.n_embd, found.n_head, found.n_head_kv) == (30, 576, 9, 3)
    assert found.n_key == found.n_value == 30 * 3 * 64
    assert "byte-pair" in str(facts.ENGINES["ctransformers"].supports(header))


# -- the library ----------------------------------------------------------------------------------------


def test_the_library_is_found_without_loading_it(tmp_path: Path) -> None:
    code = (
        "import sys; from tinyoai.engine import facts; print(facts.ENGINES['llamacpp'].installed(), "
        "[m for m in ('ctypes', '_cffi_backend', 'llama_cpp', 'xllamacpp', 'numpy') if m in sys.modules])"
    )

    def say(**extra: str) -> str:
        # -S: without the packages that are installed here, but for those that the facts import
        kept = {k: v for k, v in os.environ.items() if not k.startswith("TINYOAI_")}
        code_ = f"import sys; sys.path[:0] = {paths!r}; {code}"
        done = subprocess.run(
            [sys.executable, "-S", "-c", code_],
            capture_output=True, text=True, check=True, env={**kept, **extra},
        )  # fmt: skip
        return done.stdout.strip()

    (tmp_path / "packages").mkdir()
    spec = importlib.util.find_spec("msgspec")
    assert spec is not None
    assert spec.origin is not None
    (tmp_path / "packages" / "msgspec").symlink_to(Path(spec.origin).parent)
    paths = [str(Path(facts.__file__).parents[2]), str(tmp_path / "packages")]
    assert say() == "False []"
    assert say(TINYOAI_LLAMA_LIBRARY="/x/libllama.so") == "True []"
    (tmp_path / "packages" / "xllamacpp").mkdir()
    (tmp_path / "packages" / "xllamacpp" / "__init__.py").write_text("raise SystemExit('it was imported')")
    assert say() == "True []"


# -- the context window ------------------------------------------------------------------------------------


def window(n_ctx_train: int, capacity: int, **fields: Any) -> int:
    """The context window that a model of 1000 keys and values a token gets."""
    hparams = structs.replace(HPARAMS, n_key=500, n_value=500)
    load = structs.replace(LOAD, n_ctx=0, **fields)
    return facts.complete(load, hparams, n_ctx_train, capacity).n_ctx


HPARAMS = facts.HParams(n_layer=1, n_embd=64, n_head=2, n_head_kv=2, n_ff=128, n_vocab=600)


def test_the_window_is_the_model_s_own_within_a_quarter_of_the_memory() -> None:
    assert window(2048, 100 * GB) == 2048
    assert window(131_072, 100 * GB) == 32_768
    assert window(131_072, 1000) == 4096
    some = window(131_072, 200 * 10**6)
    assert 4096 < some < 32_768
    assert some % 32 == 0
    # one conversation may use all cells: 2000 bytes for each, and more for its place in the mask
    assert some * 2000 < 50 * 10**6 < (some + 32) * 2300
    assert window(131_072, 200 * 10**6, n_slots=1) == some
    assert window(131_072, 200 * 10**6, kv="separate", n_slots=2) == pytest.approx(some / 2, abs=32)
    assert window(131_072, 200 * 10**6, cache_type_k="q4_0", cache_type_v="q4_0") == 32_768
    assert window(0, 100 * GB) == 0


def test_a_chosen_window_stays() -> None:
    load = structs.replace(LOAD, n_ctx=77, n_batch=5)
    assert facts.complete(load, HPARAMS, 4096, 1) == structs.replace(load, n_cells=154)
    separate = structs.replace(load, kv="separate", n_slots=3)
    assert facts.complete(separate, HPARAMS, 4096, 1) == structs.replace(separate, n_cells=231)


def test_slots_and_cells_follow_the_memory() -> None:
    hparams = structs.replace(HPARAMS, n_key=500, n_value=500)
    load = structs.replace(LOAD, n_ctx=0, n_slots=0, n_batch=64)

    def found(capacity: int, **fields: Any) -> tuple[int, int, int]:
        got = facts.complete(structs.replace(load, **fields), hparams, 16_384, capacity)
        return got.n_slots, got.n_ctx, got.n_cells

    assert found(100 * GB) == (16, 16_384, 65_536)
    assert found(1) == (4, 4096, 4096)
    n_slots, n_ctx, n_cells = found(200 * 10**6)
    assert (n_slots, n_ctx) == (5, 16_384)
    assert n_ctx < n_cells < 4 * n_ctx
    assert found(100 * GB, n_slots=2) == (2, 16_384, 32_768)
    assert found(100 * GB, n_slots=30) == (30, 16_384, 65_536)
    assert found(1, n_ctx=9000) == (4, 9000, 9000)
    assert found(100 * GB, kv="separate") == (4, 16_384, 65_536)
    assert found(100 * GB, kv="separate", n_slots=8) == (8, 8192, 65_536)
    assert found(100 * GB, kv="separate", n_slots=8, n_ctx=16_384) == (8, 16_384, 131_072)


def test_small_models_get_streams_of_their_own_where_that_costs_no_window() -> None:
    hparams = structs.replace(HPARAMS, n_key=500, n_value=500)
    load = structs.replace(LOAD, n_ctx=0, n_slots=0, n_batch=64, kv="auto")

    def kv(capacity: int, size: int, hparams: facts.HParams = hparams, **fields: Any) -> str:
        return facts.complete(structs.replace(load, **fields), hparams, 16_384, capacity, size).kv

    assert kv(100 * GB, 10**8) == "separate"
    assert kv(100 * GB, 2 * GB) == "unified"
    assert kv(200 * 10**6, 10**8) == "unified"
    assert kv(100 * GB, 10**8, n_slots=8) == "unified"
    assert kv(100 * GB, 10**8, structs.replace(hparams, n_state=5)) == "unified"
    assert kv(100 * GB, 10**8, structs.replace(hparams, sliding_window=True)) == "unified"
    assert kv(100 * GB, 2 * GB, kv="separate") == "separate"
    assert kv(100 * GB, 10**8, kv="unified") == "unified"


def test_steps_are_smaller_where_their_buffers_take_much_of_the_memory() -> None:
    hparams = structs.replace(HPARAMS, n_key=500, n_value=500, n_row=50_000)
    load = structs.replace(LOAD, n_ctx=0, n_batch=0)
    sizes = [facts.complete(load, hparams, 4096, n * GB).n_batch for n in (1, 2, 4, 64)]
    assert sizes == [128, 256, 512, 512]


def test_an_encoder_s_window_is_cut_further() -> None:
    encoder = structs.replace(HPARAMS, whole_rows=True, n_vocab=250_000)
    load = structs.replace(LOAD, n_ctx=0)
    assert facts.complete(load, encoder, 8192, 10**6).n_ctx == 512
    assert 512 < facts.complete(load, encoder, 8192, 8 * GB).n_ctx < 4096
    assert facts.complete(load, encoder, 8192, 100 * GB).n_ctx == 8192


def test_learned_positions_bound_a_chosen_window_too(sound: Path) -> None:
    header = gguf.read_header(sound)
    header.tensors["position_embd.weight"] = header.tensors["token_embd.weight"]._replace(shape=(64, 300))
    hparams = llamacpp.hparams(header)
    assert facts.complete(structs.replace(LOAD, n_ctx=1000), hparams, 512, GB).n_ctx == 300
    assert facts.complete(structs.replace(LOAD, n_ctx=0), hparams, 512, GB).n_ctx == 300


def test_each_engine_has_its_own_steps_and_window() -> None:
    load = structs.replace(LOAD, n_ctx=0, n_batch=0)
    found = facts.complete(load, HPARAMS, 100_000, 100 * GB)
    assert (found.n_batch, found.n_ctx) == (512, 32_768)
    found = facts.complete(structs.replace(load, engine="ctransformers"), HPARAMS, 100_000, 100 * GB)
    assert (found.n_batch, found.n_ctx) == (32, 4096)


# -- memory -----------------------------------------------------------------------------------------------


def test_every_cache_type_of_the_options_has_a_size(sound: Path) -> None:
    header = gguf.read_header(sound)
    hparams = llamacpp.hparams(header)
    assert (hparams.n_key, hparams.n_value) == (3 * 64, 3 * 64)
    sizes = {}
    for name in options.CACHE_TYPES:
        load = structs.replace(LOAD, cache_type_k=name, cache_type_v=name)
        sizes[name] = llamacpp.estimate(hparams, header.file_size, load).per_token
    assert sizes["f32"] > sizes["f16"] == sizes["bf16"] > sizes["q8_0"] > sizes["q5_1"] > sizes["q4_0"]
    assert sizes["f32"] - sizes["f16"] == 2 * 2 * 3 * 128


def test_keys_and_values_by_layer(sound: Path) -> None:
    header = gguf.read_header(sound)
    for i, n in enumerate((64, 32, 0)):
        for part in "kv":
            name = f"blk.{i}.attn_{part}.weight"
            if n:
                header.tensors[name] = header.tensors[name]._replace(shape=(64, n))
            else:
                del header.tensors[name]
    set_value(header, "attention.head_count_kv", array("I", [2, 1, 0]))
    # the last layer is recurrent
    header.tensors["blk.2.ssm_conv1d.weight"] = header.tensors["output.weight"]
    for key, value in (("conv_kernel", 4), ("inner_size", 128), ("state_size", 16), ("group_count", 1)):
        set_value(header, f"ssm.{key}", value)
    found = llamacpp.hparams(header)
    assert (found.n_key, found.n_value) == (96, 96)
    assert found.n_state == 3 * (128 + 2 * 16) + 128 * 16
    more = llamacpp.estimate(found, 0, structs.replace(LOAD, n_slots=3)).fixed
    assert more - llamacpp.estimate(found, 0, LOAD).fixed > 4 * found.n_state


def test_compressed_attention_keeps_keys_alone(sound: Path) -> None:
    header = rename(gguf.read_header(sound), "deepseek2")
    for key, value in (
        ("head_count_kv", 1),
        ("key_length", 40),
        ("value_length", 32),
        ("key_length_mla", 24),
    ):
        set_value(header, f"attention.{key}", value)
    assert (llamacpp.hparams(header).n_key, llamacpp.hparams(header).n_value) == (3 * 40, 0)


def test_draft_layers_and_shared_caches_take_none(sound: Path) -> None:
    header = gguf.read_header(sound)
    set_value(header, "nextn_predict_layers", 1)
    assert llamacpp.hparams(header).n_key == 2 * 64
    set_value(header, "attention.shared_kv_layers", 1)
    assert llamacpp.hparams(header).n_key == 1 * 64


def test_an_encoder_has_no_cache(sound: Path) -> None:
    header = rename(gguf.read_header(sound), "bert")
    found = llamacpp.hparams(header)
    assert (found.whole_rows, found.n_key) == (True, 0)
    one, many = (llamacpp.estimate(found, 0, structs.replace(LOAD, n_slots=n)).per_token for n in (1, 8))
    assert one == many > 0


def test_weights_in_another_order_are_kept_twice(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.platform, "machine", lambda: "x86_64")
    header = gguf.read_header(sound)
    assert llamacpp.hparams(header).repacked_bytes == 0
    for name in ("blk.0.ffn_up.weight", "token_embd.weight", "output_norm.weight"):
        retype(header, name, 2)
    found = llamacpp.hparams(header)
    assert found.repacked_bytes == found.staging_bytes == header.tensors["blk.0.ffn_up.weight"].size
    mapped = llamacpp.estimate(found, 0, LOAD).total
    assert mapped == llamacpp.estimate(found, 0, structs.replace(LOAD, mmap=False)).total
    embeddings = header.tensors["token_embd.weight"]
    header.tensors["token_embd.weight"] = embeddings._replace(shape=(64, 488))
    assert llamacpp.hparams(header).repacked_bytes == found.repacked_bytes
    del header.tensors["output.weight"]  # then the embeddings are the output too
    both = llamacpp.hparams(header)
    assert both.repacked_bytes == found.repacked_bytes + embeddings.size
    assert both.staging_bytes == embeddings.size
    mapped = llamacpp.estimate(both, 0, LOAD).total
    assert (
        mapped - llamacpp.estimate(both, 0, structs.replace(LOAD, mmap=False)).total == found.repacked_bytes
    )


def test_flash_attention_saves_memory(sound: Path) -> None:
    found = llamacpp.hparams(gguf.read_header(sound))
    on, off = (
        llamacpp.estimate(found, 0, structs.replace(LOAD, flash_attn=f)).per_token for f in ("on", "off")
    )
    assert off - on == 2 * 64 * (4 * 3 - 2)
    assert not llamacpp.hparams(rename(gguf.read_header(sound), "grok")).flash_attention


def test_the_figures_of_smollm2() -> None:
    header = smollm2()
    found = llamacpp.hparams(header)
    # resident with all pages touched, in MB: 4 slots of 1024 tokens
    for cache, measured in (("f16", 276.3), ("q8_0", 232.3), ("q4_0", 208.7)):
        load = structs.replace(LOAD, n_slots=4, cache_type_k=cache, cache_type_v=cache)
        total = llamacpp.estimate(found, header.file_size, load).total / 1e6
        assert measured <= total <= measured + max(30, 0.15 * measured)
