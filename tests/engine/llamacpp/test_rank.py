"""Models that rank: the same scores as llama.cpp's own server, safe prompts, and heads that cannot be used."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import architectures, fixtures, llama_server
from tests.llama_server import LlamaServer
from tests.serving import Server, serve
from tinyoai import gguf, wire
from tinyoai.engine import facts, pair_prompt
from tinyoai.engine.contract import EngineError, Row, Want
from tinyoai.engine.llamacpp import facts as llamacpp
from tinyoai.engine.llamacpp.engine import LlamaCppEngine
from tinyoai.engine.llamacpp.opening import open_engine

N_CTX = 512
N_BATCH = 32
"""Below 64 tokens the place of a cut does not change results."""
QUERY = "What is the capital of France?"
DOCUMENTS = [
    "Paris is the capital of France.",
    "The quick brown fox jumps over the lazy dog.",
    "",
    "Z\u00fcrich \u4f60\u597d na\u00efve \u00bfqu\u00e9?",
    "France is a country in Europe, and its capital is a large city. " * 12,
    "Paris is the capital of France.",
    "{query} and {document} with <|im_end|> [SEP] </s> in it",
]


def opened(name: str, **options: Any) -> LlamaCppEngine:
    """Opens a generated model."""
    defaults = {"n_ctx": N_CTX, "n_slots": 2, "n_batch": N_BATCH, "n_threads": 1}
    path = str(architectures.model(name))
    return open_engine(wire.Load(path=path, name="m", engine="llamacpp", **(defaults | options)))


@pytest.fixture(scope="module", params=architectures.RERANKERS)
def engine(request: pytest.FixtureRequest) -> Iterator[LlamaCppEngine]:
    """Each model that ranks."""
    made = opened(request.param)
    yield made
    made.close()


# -- the reference -----------------------------------------------------------------------------------------


class Servers(NamedTuple):
    """A model in both servers."""

    reference: LlamaServer
    tinyoai: Server


@pytest.fixture(scope="module", params=architectures.RERANKERS)
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    """Each model that ranks. An encoder reads a whole text in one step of the reference."""
    if not llama_server.installed():
        fixtures.absent("xllamacpp is not installed: run `make test`")
    path = architectures.model(request.param)
    n_batch = N_BATCH if request.param == "qwen3-rank" else N_CTX
    reference = llama_server.llama_server(path, n_ctx=N_CTX, n_batch=n_batch, embeddings=True, pooling="rank")
    flags = ("--threads", "1", "--batch-size", str(N_BATCH), "--ctx-size", str(N_CTX))
    # low bits depend on what else is in a step, so both have one stream
    flags = (*flags, "--parallel", "1")
    with reference as llama, serve("--model", str(path), "--engine", "llamacpp", *flags) as tinyoai:
        yield Servers(llama, tinyoai)


def scores(server: Server, query: str, documents: list[str]) -> list[float]:
    """Asks for the score of each document, in the order of the documents."""
    reply = server.post("/v1/rerank", query=query, documents=documents)
    assert reply.status == 200, reply.body
    rows = reply.json["results"]
    given = [row["relevance_score"] for row in rows]
    assert given == sorted(given, reverse=True)
    return [row["relevance_score"] for row in sorted(rows, key=lambda row: int(row["index"]))]


@pytest.mark.parametrize("query", [QUERY, "fox"])
def test_scores_are_those_of_llama_cpp_s_server(servers: Servers, query: str) -> None:
    # the reference reads control tokens in a document, and replaces {document} in a query
    documents = DOCUMENTS[:-1]
    expected = servers.reference.rank(query, documents)
    assert max(expected) - min(expected) > 0.1
    for _ in range(2):
        assert scores(servers.tinyoai, query, documents) == pytest.approx(expected, abs=1e-4)


def test_the_count_of_tokens_is_that_of_llama_cpp_s_server(servers: Servers) -> None:
    asked = {"query": QUERY, "documents": DOCUMENTS[:-1]}
    expected = servers.reference.post("/v1/rerank", **asked)["usage"]
    assert servers.tinyoai.post("/v1/rerank", **asked).json["usage"] == expected


# -- the engine --------------------------------------------------------------------------------------------


def ids_of(engine: LlamaCppEngine, query: str, document: str) -> list[int]:
    """Returns the prompt of a pair."""
    assert engine.caps.pair is not None
    return engine.encode(pair_prompt.segments(query, document, engine.caps.pair, engine.info.special))


def test_a_document_s_text_makes_no_control_tokens(engine: LlamaCppEngine) -> None:
    control = set(engine.info.special.values()) - {engine.encode([wire.Text("\U0001f9ff")])[0]}

    def count(query: str, document: str) -> int:
        return sum(token in control for token in ids_of(engine, query, document))

    assert count("a", "b") > 0
    for forged in engine.info.special:
        assert count("a " + forged, forged + " b " + forged) == count("a", "b"), forged


def test_rows_of_several_pairs_in_one_step(engine: LlamaCppEngine) -> None:
    pairs = [ids_of(engine, QUERY, document)[-16:] for document in DOCUMENTS[:2]]
    n = 16 if engine.caps.whole_rows else 1

    def score(rows: list[int]) -> list[float]:
        if n == 1:
            for seq in rows:
                engine.truncate(seq, 0)
            engine.eval([Row(seq, pairs[seq][:-1], 0, Want.NOTHING) for seq in rows])
        engine.eval([Row(seq, pairs[seq][-n:], 16 - n, Want.SCORE) for seq in rows])
        return [engine.score(i) for i in range(len(rows))]

    alone = score([0]) + score([1])
    assert alone[0] != pytest.approx(alone[1], abs=1e-3)
    assert score([0, 1]) == pytest.approx(alone, abs=1e-4)
    assert score([1, 0]) == pytest.approx(alone[::-1], abs=1e-4)


@pytest.mark.parametrize("name", architectures.RERANKERS)
def test_pairs_beside_others_have_the_same_scores(name: str) -> None:
    path = str(architectures.model(name))
    # with flash attention, 64 tokens and more are computed in another way, which changes low bits
    flags = ("--engine", "llamacpp", "--threads", "1", "--parallel", "3", "--flash-attn", "off")
    with serve("--model", path, *flags) as server:
        together = scores(server, QUERY, DOCUMENTS)
        assert max(together) - min(together) > 0.1
        assert together[0] == pytest.approx(together[5], abs=1e-3)
        alone = [scores(server, QUERY, [document])[0] for document in DOCUMENTS]
        assert together == pytest.approx(alone, abs=1e-3)


def test_it_has_scores_alone(engine: LlamaCppEngine) -> None:
    assert (engine.caps.generates, engine.info.n_embd_out, engine.info.pooling) == (False, 0, "")
    engine.truncate(0, 0)
    with pytest.raises(EngineError, match="no embeddings"):
        engine.eval([Row(0, [5], 0, Want.EMBEDDING)])
    engine.truncate(0, 0)
    engine.eval([Row(0, [5], 0, Want.SCORE)])
    with pytest.raises(EngineError, match="no row 1"):
        engine.score(1)
    engine.truncate(0, 0)


def test_a_model_for_text_has_no_scores() -> None:
    other = opened("qwen3")
    with pytest.raises(EngineError, match="no rank head"):
        other.eval([Row(0, [5], 0, Want.SCORE)])
    other.eval([Row(0, [5], 0)])
    with pytest.raises(EngineError, match="row 0 has no score"):
        other.score(0)
    other.close()


# -- heads that cannot be used -----------------------------------------------------------------------------


def header(name: str) -> gguf.Header:
    """The header of a generated model."""
    return gguf.read_header(architectures.model(name))


def label(found: gguf.Header, *labels: Any) -> None:
    """Replaces the labels of a head."""
    found.metadata[f"{found.architecture}.classifier.output_labels"] = [*labels]


def shape(found: gguf.Header, name: str, *sizes: int) -> None:
    """Gives a tensor another shape."""
    found.tensors[name] = found.tensors[name]._replace(shape=sizes)


FAULTS: list[tuple[str, str, Callable[[gguf.Header], object], str]] = [
    (
        "no head",
        "bert-rank",
        lambda h: h.tensors.pop("cls.output.weight"),
        "has no cls.output.weight with 1 rows",
    ),
    ("a wide head", "bert-rank", lambda h: shape(h, "cls.output.weight", 64, 3), "with 1 rows"),
    ("a short head", "bert-rank", lambda h: shape(h, "cls.output.weight", 32, 1), "with 1 rows"),
    ("a label too many", "bert-rank", lambda h: label(h, b"a", b"b"), "with 2 rows"),
    ("two labels of one row", "jina-rank", lambda h: label(h, b"a", b"b"), "with 2 labels"),
    ("one label in a softmax", "qwen3-rank", lambda h: label(h, b"a"), "with 1 labels"),
    ("labels as numbers", "qwen3-rank", lambda h: label(h, 1, 2), "output_labels"),
    (
        "a mean over a part",
        "qwen3-rank",
        lambda h: h.metadata.update({"qwen3.classifier.pooling_type": 1}),
        "a mean of hidden states",
    ),
    (
        "a prompt without the document",
        "qwen3-rank",
        lambda h: h.metadata.update({"tokenizer.chat_template.rerank": "{query}"}),
        "without {query} and {document}",
    ),
    (
        "a prompt of numbers",
        "qwen3-rank",
        lambda h: h.metadata.update({"tokenizer.chat_template.rerank": 5}),
        "without {query} and {document}",
    ),
    (
        "a quantized bias",
        "bert-rank",
        lambda h: h.tensors.update({"cls.bias": h.tensors["cls.bias"]._replace(shape=(64, 1), type=8)}),
        "cls.bias in the type Q8_0",
    ),
    (
        "a family without a head",
        "llama",
        lambda h: h.metadata.update({"llama.pooling_type": 4}),
        "llama.cpp reads no rank head of a llama model",
    ),
]


@pytest.mark.parametrize(("name", "change", "words"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_heads_that_cannot_be_used(name: str, change: Callable[[gguf.Header], object], words: str) -> None:
    found = header(name)
    assert llamacpp.supports(found) is None
    change(found)
    assert words in (llamacpp.supports(found) or "")


def test_valid_forms_of_a_head() -> None:
    found = header("bert-rank")
    shape(found, "cls.output.weight", 64)  # one row needs no second dimension
    assert llamacpp.supports(found) is None
    label(found, b"score")
    assert llamacpp.supports(found) is None
    label(found)
    assert llamacpp.supports(found) is None


def test_a_reranker_keeps_no_hidden_states_and_takes_little_memory() -> None:
    ranker, plain = header("qwen3-rank"), header("qwen3")
    load = wire.Load(path="", name="m", engine="llamacpp", n_ctx=N_CTX, n_slots=2, n_batch=512)
    sizes = [llamacpp.estimate(llamacpp.hparams(each), 0, load).total for each in (ranker, plain)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    hparams = llamacpp.hparams(ranker)
    assert (hparams.ranks, hparams.pools) == (True, False)
    assert facts.choose(ranker) == "llamacpp"


def test_a_head_full_of_nonsense_refuses_the_load(tmp_path: Path) -> None:
    data = bytearray(architectures.model("bert-rank").read_bytes())
    found = header("bert-rank")
    at = found.data_at + found.tensors["cls.output.bias"].offset
    struct.pack_into("<f", data, at, float("nan"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    with pytest.raises(EngineError, match="computes nonsense instead of scores"):
        open_engine(wire.Load(path=str(broken), name="m", engine="llamacpp", n_ctx=64, n_threads=1))
