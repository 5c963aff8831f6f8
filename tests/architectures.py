"""Makes small models of today's architectures: random weights from a fixed seed, and the vocabulary of a real model.

`model("qwen3")` returns a file; it is made at the first call and kept beside the other fixtures. Without
the vocabularies that `make fixtures` fetches, the test that asks is skipped. `python -m tests.architectures` makes all.
"""

import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

from tests import fixtures

VERSION = 2
"""The version of the recipes. Another version makes all models again."""

N_EMBD, N_HEAD, N_HEAD_KV, HEAD, N_FF, N_CTX = 64, 2, 1, 32, 128, 4096
Q8_0 = gguf.GGMLQuantizationType.Q8_0
F32 = gguf.GGMLQuantizationType.F32

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


class Weight(NamedTuple):
    """A tensor: its dimensions in the file's order, and the distribution of its values."""

    name: str
    shape: tuple[int, ...]
    spread: float
    mean: float = 0.0
    plain: bool = False
    """Never quantized: the graph adds it to other vectors."""


def matrix(name: str, n_in: int, n_out: int, gain: float = 1.5) -> Weight:
    """A matrix that maps vectors of length n_in whose elements have a spread of 1 to elements with a spread of `gain`."""
    return Weight(f"{name}.weight", (n_in, n_out), gain / n_in**0.5)


def norm(name: str, n: int = N_EMBD) -> Weight:
    """The weights of a normalization: near 1, and all different."""
    return Weight(f"{name}.weight", (n,), 0.2, 1.0)


def bias(name: str, n: int = N_EMBD) -> Weight:
    """Small additions."""
    return Weight(f"{name}.bias", (n,), 0.1)


def ends(n_vocab: int, embedding: float = 1.0) -> Iterator[Weight]:
    """The first and the last layer. Logits have a spread of 3, so that ties do not occur."""
    yield Weight("token_embd.weight", (N_EMBD, n_vocab), embedding)
    yield norm("output_norm")
    yield matrix("output", N_EMBD, n_vocab, 3)


def attention(at: str) -> Iterator[Weight]:
    """Attention that looks at few tokens: the products of queries and keys have a spread of 3."""
    yield norm(f"{at}.attn_norm")
    yield matrix(f"{at}.attn_q", N_EMBD, N_HEAD * HEAD, 1.7)
    yield matrix(f"{at}.attn_k", N_EMBD, N_HEAD_KV * HEAD, 1.7)
    yield matrix(f"{at}.attn_v", N_EMBD, N_HEAD_KV * HEAD)
    yield matrix(f"{at}.attn_output", N_HEAD * HEAD, N_EMBD)


def feed_forward(at: str, norm_name: str = "ffn_norm.weight") -> Iterator[Weight]:
    """The gated kind."""
    yield norm(f"{at}.ffn_norm")._replace(name=f"{at}.{norm_name}")
    yield matrix(f"{at}.ffn_gate", N_EMBD, N_FF)
    yield matrix(f"{at}.ffn_up", N_EMBD, N_FF)
    yield matrix(f"{at}.ffn_down", N_FF, N_EMBD)


def head_norms(at: str) -> Iterator[Weight]:
    """Queries and keys are normalized in each head; a mean above 1 keeps attention on few tokens."""
    for name in ("attn_q_norm", "attn_k_norm"):
        yield Weight(f"{at}.{name}.weight", (HEAD,), 0.2, 1.7)


def layers(n: int) -> list[str]:
    """The name of each layer."""
    return [f"blk.{i}" for i in range(n)]


def llama(n_vocab: int) -> Iterator[Weight]:
    """The plain transformer."""
    yield from ends(n_vocab)
    for at in layers(2):
        yield from attention(at)
        yield from feed_forward(at)


def qwen2(n_vocab: int) -> Iterator[Weight]:
    """llama with additions to queries, keys and values."""
    yield from llama(n_vocab)
    for at in layers(2):
        yield bias(f"{at}.attn_q", N_HEAD * HEAD)
        yield bias(f"{at}.attn_k", N_HEAD_KV * HEAD)
        yield bias(f"{at}.attn_v", N_HEAD_KV * HEAD)


def qwen3(n_vocab: int) -> Iterator[Weight]:
    """llama with normalized queries and keys."""
    yield from llama(n_vocab)
    for at in layers(2):
        yield from head_norms(at)


def gemma3(n_vocab: int) -> Iterator[Weight]:
    """Five layers see a sliding window and the sixth sees everything. The graph scales embeddings by sqrt(N_EMBD)."""
    yield from ends(n_vocab, N_EMBD**-0.5)
    for at in layers(6):
        yield from attention(at)
        yield from head_norms(at)
        yield norm(f"{at}.post_attention_norm")
        yield from feed_forward(at)
        yield norm(f"{at}.post_ffw_norm")


def phi3(n_vocab: int) -> Iterator[Weight]:
    """llama with fused matrices."""
    yield from ends(n_vocab)
    for at in layers(2):
        yield norm(f"{at}.attn_norm")
        yield matrix(f"{at}.attn_qkv", N_EMBD, (N_HEAD + 2 * N_HEAD_KV) * HEAD, 1.7)
        yield matrix(f"{at}.attn_output", N_HEAD * HEAD, N_EMBD)
        yield norm(f"{at}.ffn_norm")
        yield matrix(f"{at}.ffn_up", N_EMBD, 2 * N_FF)
        yield matrix(f"{at}.ffn_down", N_FF, N_EMBD)


N_SSM, N_STATE, N_SSM_HEAD, N_CONV = 64, 16, 4, 4


def falcon_h1(n_vocab: int) -> Iterator[Weight]:
    """Every layer has attention and a state-space part side by side."""
    yield from ends(n_vocab)
    for at in layers(2):
        yield from attention(at)
        yield from feed_forward(at, "ffn_norm")
        n_mixed = N_SSM + 2 * N_STATE
        yield matrix(f"{at}.ssm_in", N_EMBD, N_SSM + n_mixed + N_SSM_HEAD)
        yield matrix(f"{at}.ssm_conv1d", N_CONV, n_mixed)
        yield bias(f"{at}.ssm_conv1d", n_mixed)
        yield Weight(f"{at}.ssm_dt.bias", (N_SSM_HEAD,), 0.5, -1.0)
        yield Weight(f"{at}.ssm_a", (1, N_SSM_HEAD), 0.05, -0.3)
        yield Weight(f"{at}.ssm_d", (1, N_SSM_HEAD), 0.2, 1.0)
        yield Weight(f"{at}.ssm_norm.weight", (N_SSM, 1), 0.2, 1.0)
        yield matrix(f"{at}.ssm_out", N_SSM, N_EMBD)


def bert(n_vocab: int) -> Iterator[Weight]:
    """An encoder: attention in both directions, and learned positions."""
    yield Weight("token_embd.weight", (N_EMBD, n_vocab), 1.0)
    yield Weight("token_types.weight", (N_EMBD, 2), 0.3, plain=True)
    yield Weight("position_embd.weight", (N_EMBD, 512), 0.5, plain=True)
    yield from (norm("token_embd_norm"), bias("token_embd_norm"))
    for at in layers(2):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield from (matrix(f"{at}.{part}", N_EMBD, N_EMBD), bias(f"{at}.{part}"))
        yield from (norm(f"{at}.attn_output_norm"), bias(f"{at}.attn_output_norm"))
        yield from (matrix(f"{at}.ffn_up", N_EMBD, N_FF), bias(f"{at}.ffn_up", N_FF))
        yield from (matrix(f"{at}.ffn_down", N_FF, N_EMBD), bias(f"{at}.ffn_down"))
        yield from (norm(f"{at}.layer_output_norm"), bias(f"{at}.layer_output_norm"))


RERANK_TEMPLATE = (
    "<|im_start|>system\nJudge the Document by the Query.<|im_end|>\n<|im_start|>user\n<Query>: {query}\n"
    "<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
"""As Qwen3-Reranker has it."""


def bert_rank(n_vocab: int) -> Iterator[Weight]:
    """An encoder that ranks: a layer with a tanh, and the score."""
    yield from bert(n_vocab)
    yield from (matrix("cls", N_EMBD, N_EMBD), bias("cls"))
    yield from (matrix("cls.output", N_EMBD, 1, 3), bias("cls.output", 1))


def xlmr_rank(n_vocab: int) -> Iterator[Weight]:
    """The same for a vocabulary of XLM-RoBERTa, which has one type of token."""
    for weight in bert_rank(n_vocab):
        yield weight._replace(shape=(N_EMBD, 1)) if weight.name == "token_types.weight" else weight


def jina_rank(n_vocab: int) -> Iterator[Weight]:
    """An encoder without positions, whose one layer gives the score."""
    yield Weight("token_embd.weight", (N_EMBD, n_vocab), 1.0)
    yield Weight("token_types.weight", (N_EMBD, 2), 0.3, plain=True)
    yield from (norm("token_embd_norm"), bias("token_embd_norm"))
    for at in layers(2):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield from (matrix(f"{at}.{part}", N_EMBD, N_EMBD), bias(f"{at}.{part}"))
        yield from (norm(f"{at}.attn_output_norm"), bias(f"{at}.attn_output_norm"))
        yield matrix(f"{at}.ffn_gate", N_EMBD, N_FF)
        yield matrix(f"{at}.ffn_up", N_EMBD, N_FF)
        yield from (matrix(f"{at}.ffn_down", N_FF, N_EMBD), bias(f"{at}.ffn_down"))
        yield from (norm(f"{at}.layer_output_norm"), bias(f"{at}.layer_output_norm"))
    yield from (matrix("cls", N_EMBD, 1), bias("cls", 1))


def modern_rank(n_vocab: int) -> Iterator[Weight]:
    """An encoder with rotary positions, whose score is of the mean over all tokens."""
    yield Weight("token_embd.weight", (N_EMBD, n_vocab), 1.0)
    yield from (norm("token_embd_norm"), norm("output_norm"))
    for i, at in enumerate(layers(3)):
        if i:
            yield norm(f"{at}.attn_norm")
        yield matrix(f"{at}.attn_qkv", N_EMBD, 3 * N_EMBD, 1.7)
        yield matrix(f"{at}.attn_output", N_EMBD, N_EMBD)
        yield matrix(f"{at}.ffn_up", N_EMBD, 2 * N_FF)
        yield matrix(f"{at}.ffn_down", N_FF, N_EMBD)
        yield norm(f"{at}.ffn_norm")
    yield from (matrix("cls", N_EMBD, N_EMBD), norm("cls.norm"))
    yield from (matrix("cls.output", N_EMBD, 1, 3), bias("cls.output", 1))


def qwen3_rank(n_vocab: int) -> Iterator[Weight]:
    """A decoder that ranks: the share of its first label is the score."""
    yield from qwen3(n_vocab)
    yield matrix("cls.output", N_EMBD, 2, 2)


class Recipe(NamedTuple):
    """One model."""

    arch: str
    vocabulary: str
    """The name of the real vocabulary."""
    n_layer: int
    weights: Callable[[int], Iterator[Weight]]
    """Takes the number of tokens."""
    values: dict[str, Any]
    """Metadata beside that of every model, without the architecture's prefix."""
    rank_template: str = ""


_BERT: dict[str, Any] = {
    "context_length": 512,
    "attention.head_count_kv": N_HEAD,
    "attention.layer_norm_epsilon": 1e-12,
    "attention.causal": False,
}
_BOTH_WAYS = {"attention.causal": False, "pooling_type": 1}
RECIPES = {
    "llama": Recipe("llama", "llama-bpe", 2, llama, {"rope.freq_base": 500_000.0}),
    "qwen2": Recipe("qwen2", "qwen2", 2, qwen2, {"rope.freq_base": 1_000_000.0}),
    "qwen3": Recipe("qwen3", "qwen2", 2, qwen3, {"rope.freq_base": 1_000_000.0}),
    "gemma3": Recipe("gemma3", "llama-spm", 6, gemma3, {"attention.sliding_window": 64}),
    "phi3": Recipe("phi3", "phi-3", 2, phi3, {"rope.scaling.original_context_length": N_CTX}),
    "falcon-h1": Recipe(
        "falcon-h1",
        "falcon",
        2,
        falcon_h1,
        {
            "ssm.conv_kernel": N_CONV,
            "ssm.inner_size": N_SSM,
            "ssm.state_size": N_STATE,
            "ssm.time_step_rank": N_SSM_HEAD,
            "ssm.group_count": 1,
        },
    ),
    "llama-embed": Recipe("llama-embed", "llama-bpe", 2, llama, _BOTH_WAYS),
    "qwen2-embed": Recipe("qwen2", "qwen2", 2, qwen2, _BOTH_WAYS),
    "bert": Recipe("bert", "bert-bge", 2, bert, {**_BERT, "pooling_type": 2}),
    "bert-mean": Recipe("bert", "bert-bge", 2, bert, {**_BERT, "pooling_type": 1}),
    "bert-rank": Recipe("bert", "bert-bge", 2, bert_rank, {**_BERT, "pooling_type": 4}),
    "xlmr-rank": Recipe("bert", "nomic-bert-moe", 2, xlmr_rank, {**_BERT, "pooling_type": 4}),
    "jina-rank": Recipe("jina-bert-v2", "bert-bge", 2, jina_rank, {**_BERT, "pooling_type": 4}),
    "modern-rank": Recipe(
        "modern-bert",
        "bert-bge",
        3,
        modern_rank,
        {**_BERT, "attention.sliding_window": 128, "rope.freq_base_swa": 10_000.0, "pooling_type": 4},
    ),
    "qwen3-rank": Recipe(
        "qwen3",
        "qwen2",
        2,
        qwen3_rank,
        {"rope.freq_base": 1e6, "pooling_type": 4, "classifier.output_labels": ["yes", "no"]},
        RERANK_TEMPLATE,
    ),
}
"""Every model by its name. Pooling type 1 is the mean, 2 the first token, 4 a score."""

RERANKERS = [name for name, recipe in RECIPES.items() if recipe.values.get("pooling_type") == 4]
"""The models that rank."""

DECODERS = [name for name, recipe in RECIPES.items() if "pooling_type" not in recipe.values]
"""The models that generate."""


def model(name: str) -> Path:
    """The file of a model. Without its vocabulary the test is skipped, or fails with CI=true."""
    recipe = RECIPES[name]
    place = fixtures.GENERATED / f"v{VERSION}" / f"{name}.gguf"
    if not place.exists():
        vocabularies = fixtures.require(fixtures.vocabularies(), f"the vocabulary {recipe.vocabulary}")
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
            file.write(build(name, recipe, vocabularies / f"ggml-vocab-{recipe.vocabulary}.gguf"))
        os.chmod(file.name, 0o644)
        os.rename(file.name, place)
    return place


def build(name: str, recipe: Recipe, vocabulary: Path) -> bytes:
    """The bytes of a model file."""
    kept = {key: raw for key, raw in metadata(vocabulary).items() if key.startswith("tokenizer.")}
    (n_vocab,) = struct.unpack_from("<Q", kept["tokenizer.ggml.tokens"], 4 + 4)
    values = {
        "context_length": N_CTX,
        "embedding_length": N_EMBD,
        "block_count": recipe.n_layer,
        "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD_KV,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "rope.dimension_count": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **recipe.values,
    }
    written = {
        "general.architecture": packed(recipe.arch),
        "general.name": packed(f"random {name}"),
        "general.file_type": packed(7),
        **{f"{recipe.arch}.{key}": packed(value) for key, value in values.items()},
        **kept,
    }
    if recipe.rank_template:
        written["tokenizer.chat_template.rerank"] = packed(recipe.rank_template)
    weights = list(recipe.weights(n_vocab))
    head = [struct.pack("<4sIQQ", b"GGUF", 3, len(weights), len(written))]
    head += [text(key) + raw for key, raw in written.items()]
    draw, data, at = np.random.default_rng(zlib.crc32(name.encode())), [], 0
    for weight in weights:
        raw, kind = tensor(weight, draw)
        head.append(text(weight.name) + struct.pack("<I", len(weight.shape)))
        head.append(struct.pack(f"<{len(weight.shape)}QIQ", *weight.shape, kind, at))
        data.append(raw + bytes(-len(raw) % 32))
        at += len(data[-1])
    header = b"".join(head)
    return b"".join([header, bytes(-len(header) % 32), *data])


def tensor(weight: Weight, draw: np.random.Generator) -> tuple[bytes, int]:
    """Random values and their type: Q8_0 where rows are blocks of 32, and F32 for vectors and short rows."""
    values: NDArray[np.float32] = draw.standard_normal(weight.shape[::-1], dtype=np.float32)
    values = values * np.float32(weight.spread) + np.float32(weight.mean)
    if weight.plain or len(weight.shape) == 1 or weight.shape[0] % 32 or 1 in weight.shape:
        return values.tobytes(), F32
    return gguf.quants.quantize(values, Q8_0).tobytes(), Q8_0


def text(value: str) -> bytes:
    """A string as GGUF has it."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def packed(value: Any) -> bytes:
    """The type and the bytes of a metadata value."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(text, value))
    return struct.pack("<I", _STRING) + text(value)


def metadata(path: Path) -> dict[str, bytes]:
    """Type and bytes of every metadata value of a GGUF file. Nothing is decoded: a vocabulary has 400,000 strings."""
    data = path.read_bytes()

    def after(kind: int, at: int) -> int:
        """Where a value ends."""
        if kind == _STRING:
            return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
        if kind != _ARRAY:
            return at + _SCALARS[kind]
        kind, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if kind in _SCALARS:
            return at + count * _SCALARS[kind]
        length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + length(data, at)[0]
        return at

    (count,) = struct.unpack_from("<Q", data, 16)
    found, at = {}, 24
    for _ in range(count):
        start = after(_STRING, at)
        (kind,) = struct.unpack_from("<I", data, start)
        end = after(kind, start + 4)
        found[data[at + 8 : start].decode()] = data[start:end]
        at = end
    return found


if __name__ == "__main__":
    for each in RECIPES:
        print(model(each), flush=True)
