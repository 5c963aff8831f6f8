"""POST /v1/rerank over real sockets: every shape of request and answer, exact scores, every error."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests import architectures
from tests.engines import make
from tests.serving import Reply, Server, serve

QUERY = "what is a red fruit"
DOCUMENTS = ["the sky is blue", "an apple is a fruit", "no", "red is red", "fruit is red"]
"""The scripted engine counts the words in common: 1, 3, 0, 2 and 3."""
ORDER = [(1, 3.0), (4, 3.0), (3, 2.0), (0, 1.0), (2, 0.0)]


def rerank(server: Server, documents: Any = DOCUMENTS, **fields: Any) -> Reply:
    """Sends one request."""
    fields.setdefault("query", QUERY)
    return server.post("/v1/rerank", documents=documents, **fields)


def ranked(reply: Reply) -> list[tuple[int, float]]:
    """Checks the shape of the answer and returns indices and scores in its order."""
    assert reply.status == 200, reply.body
    answer = reply.json
    assert set(answer) == {"id", "object", "model", "results", "usage", "meta"}
    assert answer["object"] == "list"
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"]
    assert answer["meta"] == {"tokens": {"input_tokens": answer["usage"]["total_tokens"]}}
    assert all(set(row) <= {"index", "relevance_score", "document"} for row in answer["results"])
    return [(row["index"], row["relevance_score"]) for row in answer["results"]]


def test_the_best_document_comes_first_and_equal_ones_stay_in_order(fake: Server) -> None:
    reply = rerank(fake)
    assert ranked(reply) == ORDER
    assert reply.json["model"] == "fake"
    # each pair has a token before, between and after its texts
    assert reply.json["usage"]["total_tokens"] == sum(3 + len(QUERY + text) for text in DOCUMENTS)
    assert float(reply.headers["x-queue-ms"]) >= 0


def test_texts_as_objects_and_in_the_answer(fake: Server) -> None:
    reply = rerank(fake, [{"text": "red"}, "a red fruit", {"text": "x", "title": "y"}], return_documents=True)
    assert [row["document"] for row in reply.json["results"]] == [
        {"text": "a red fruit"},
        {"text": "red"},
        {"text": "x"},
    ]
    assert all("document" not in row for row in rerank(fake).json["results"])


@pytest.mark.parametrize(("top_n", "n"), [(1, 1), (3, 3), (5, 5), (99, 5), (None, 5)])
def test_top_n_keeps_the_best(fake: Server, top_n: int | None, n: int) -> None:
    assert ranked(rerank(fake, top_n=top_n)) == ORDER[:n]


def test_null_means_absent(fake: Server) -> None:
    fields = dict.fromkeys(("texts", "top_n", "return_documents", "return_text", "keep_alive"))
    assert ranked(rerank(fake, **fields)) == ORDER


def test_without_a_model_the_default_one_ranks(fake: Server) -> None:
    reply = fake.request("POST", "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS})
    assert ranked(reply) == ORDER


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v1/reranking", "/reranking", "/v2/rerank"])
def test_every_path(fake: Server, path: str) -> None:
    assert ranked(fake.post(path, query=QUERY, documents=DOCUMENTS)) == ORDER


@pytest.mark.parametrize("return_text", [True, False])
def test_texts_are_answered_as_tei_does(fake: Server, return_text: bool) -> None:
    reply = fake.post("/rerank", query=QUERY, texts=DOCUMENTS, return_text=return_text, raw_scores=True)
    assert reply.status == 200
    texts = [{"text": DOCUMENTS[i]} if return_text else {} for i, _ in ORDER]
    assert reply.json == [{"index": i, "score": s, **t} for (i, s), t in zip(ORDER, texts, strict=True)]


def test_a_thousand_documents_are_answered_in_order(fake: Server) -> None:
    documents = [" ".join(QUERY.split()[: number % 6]) for number in range(1000)]
    found = ranked(rerank(fake, documents))
    assert found == sorted(((i, float(i % 6)) for i in range(1000)), key=lambda row: (-row[1], row[0]))


# -- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": []}, "documents"),
        ({"documents": None}, "documents"),
        ({"documents": "a"}, "documents"),
        ({"documents": {"text": "a"}}, "documents"),
        ({"documents": ["a", 5]}, "documents[1]"),
        ({"documents": ["a", {}]}, "documents[1].text"),
        ({"documents": [{"text": 5}]}, "documents[0].text"),
        ({"documents": ["a", "b\0c"]}, "documents[1]"),
        ({"documents": ["a"] * 1001}, "documents"),
        ({"documents": None, "texts": []}, "texts"),
        ({"documents": None, "texts": ["a\0"]}, "texts[0]"),
        ({"texts": ["a"]}, "texts"),
        ({"query": ""}, "query"),
        ({"query": None}, "query"),
        ({"query": ["a"]}, "query"),
        ({"query": "a\0"}, "query"),
        ({"top_n": 0}, "top_n"),
        ({"top_n": -1}, "top_n"),
        ({"top_n": 1.5}, "top_n"),
        ({"top_n": "1"}, "top_n"),
        ({"return_documents": 1}, "return_documents"),
        ({"model": 5}, "model"),
        ({"keep_alive": "soon"}, "keep_alive"),
    ],
)
def test_errors_name_the_wrong_field(fake: Server, fields: dict[str, Any], param: str) -> None:
    reply = fake.post("/v1/rerank", **{"query": QUERY, "documents": ["a"], **fields})
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    assert reply.error["param"] == param


def test_the_error_names_the_document_that_is_too_long(fake: Server) -> None:
    reply = rerank(fake, ["short", "y" * 5000, "short"])
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert reply.error["param"] == "documents[1]"
    assert "documents[1] has at least 50" in reply.error["message"]
    assert "4096 tokens" in reply.error["message"]
    # the other pairs of the request are cancelled, and the next request is answered
    assert ranked(rerank(fake)) == ORDER


def test_a_long_query_is_not_multiplied_without_limit(fake: Server) -> None:
    n = (16 << 20) // 1000
    reply = rerank(fake, ["a"] * 1000, query="q" * n)
    assert (reply.status, reply.error["param"]) == (400, "documents[0]")  # so many bytes reach the model
    reply = rerank(fake, ["a"] * 1000, query="q" * (n + 1))
    assert (reply.status, reply.error["param"]) == (400, "query")
    assert "1000 documents" in reply.error["message"]


def test_an_unknown_model_is_a_404(fake: Server) -> None:
    reply = rerank(fake, model="rerank-v3.5")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")


# a script counts tokens from its newline: one between the texts, the document and one after it make 3


def test_a_worker_that_dies_fails_only_the_running_request() -> None:
    with serve("--engine", "fake", "--log-level", "error") as server:
        reply = rerank(server, ["a"], query='!{"kill_at": 3}\n')
        assert (reply.status, reply.error["code"]) == (500, "worker_died")
        assert ranked(rerank(server)) == ORDER


def test_a_failing_engine_is_a_model_error(fake: Server) -> None:
    reply = rerank(fake, ["a"], query='!{"fail_at": 3}\n')
    assert (reply.status, reply.error["code"]) == (500, "model_error")


def test_a_client_that_disconnects_frees_every_slot() -> None:
    with serve("--engine", "fake", "--parallel", "2") as server:
        slow = '!{"prefill_ms": 200}\n'
        body = json.dumps({"query": slow, "documents": ["x" * 3000] * 500}).encode()
        with server.connect() as connection:
            head = f"POST /v1/rerank HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            while server.get("/v1/models/status").json["data"][0]["slots"]["busy"] < 2:
                time.sleep(0.01)
        # the request held both slots for minutes: without a cancel, this would not be answered in time
        assert server.say("after") == "after"


def test_a_model_without_a_rank_head_says_that_none_can(builtin: Server) -> None:
    reply = rerank(builtin)
    assert (reply.status, reply.error["param"]) == (400, "model")
    assert reply.error["message"] == (
        "tinyoai-chat cannot rank documents; no served model can; add a reranker in GGUF, such as "
        "bge-reranker-v2-m3, to the models folder"
    )


# -- real models -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A models folder with a reranker and a model for chat."""
    (tmp_path / "judge.gguf").symlink_to(architectures.model("bert-rank"))
    make.llama(tmp_path / "talker.gguf", n_embd=64, n_ctx=256)
    return tmp_path


def test_a_model_without_a_rank_head_says_which_can(folder: Path) -> None:
    with serve("--engine", "auto", "--models-dir", str(folder)) as server:
        reply = rerank(server, model="talker")
        assert (reply.status, reply.error["param"]) == (400, "model")
        assert reply.error["message"] == "talker cannot rank documents; these models can: judge"
        # it was not loaded to find out
        states = {row["id"]: row["state"] for row in server.get("/v1/models/status").json["data"]}
        assert states["talker"] == "unloaded"
        assert len(ranked(rerank(server, model="judge"))) == len(DOCUMENTS)
        card = server.get("/v1/models/judge").json
        assert (card["type"], card["capabilities"], card["state"]) == ("rerank", ["rerank"], "ready")
        assert (card["dimensions"], card["pooling"]) == (0, None)


def test_a_reranker_refuses_text_and_embeddings(folder: Path) -> None:
    with serve("--engine", "auto", "--models-dir", str(folder)) as server:
        asked: dict[str, dict[str, Any]] = {
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
            "/v1/completions": {"prompt": "hi"},
            "/v1/embeddings": {"input": "hi"},
        }
        for path, fields in asked.items():
            reply = server.post(path, **{**fields, "model": "judge"})
            assert (reply.status, reply.error["param"]) == (400, "model")
            assert "judge ranks documents" in reply.error["message"]
            assert "/v1/rerank" in reply.error["message"]
