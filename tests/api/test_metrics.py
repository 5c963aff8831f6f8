"""Metrics, read with Prometheus' own parser and compared with the requests that were made."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import Reply, Server, environment, serve
from tinyoai import metrics, wire

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(server: Server) -> Samples:
    """Scrapes the server and returns every sample by name and labels."""
    reply = server.get("/metrics")
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """Returns one sample, or 0 if it is absent."""
    return samples.get((f"tinyoai_{name}", frozenset(labels.items())), 0.0)


def until(server: Server, condition: Callable[[Samples], bool]) -> Samples:
    """Scrapes until the condition holds and returns the samples."""
    for _ in range(3000):
        samples = scrape(server)
        if condition(samples):
            return samples
    raise AssertionError("the metrics never met the condition")


def ask(server: Server, text: str, **fields: object) -> Reply:
    """Sends a chat request at temperature 0."""
    return server.chat(text, temperature=0, **fields)


@pytest.fixture(scope="module")
def counted() -> Iterator[Server]:
    """A server that no other test sends requests to, so that counts are exact."""
    with serve("--engine", "fake", "--parallel", "1", "--log-level", "error") as server:
        yield server


def test_tokens_and_times_match_the_answers(counted: Server) -> None:
    before = scrape(counted)
    replies = [
        ask(counted, text) for text in ("one and the same beginning, one", "one and the same beginning, two")
    ]
    events = ask(counted, "streamed", stream=True, stream_options={"include_usage": True}).events
    usages = [reply.json["usage"] for reply in replies] + [events[-2]["usage"]]
    timings = [reply.json["timings"] for reply in replies] + [events[-2]["timings"]]
    after = scrape(counted)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    model = {"model": "fake"}
    assert grown("prompt_tokens_total", **model) == sum(usage["prompt_tokens"] for usage in usages)
    assert grown("generated_tokens_total", **model) == sum(usage["completion_tokens"] for usage in usages)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert grown("prompt_tokens_cached_total", **model) == cached
    for name in ("time_to_first_token", "time_per_output_token", "queue_wait"):
        assert grown(f"{name}_seconds_count", **model) == 3
        assert grown(f"{name}_seconds_bucket", le="+Inf", **model) == 3
    prefill = sum(timing["prompt_ms"] for timing in timings) / 1000
    waits = grown("queue_wait_seconds_sum", **model)
    assert math.isclose(grown("time_to_first_token_seconds_sum", **model), prefill + waits, rel_tol=1e-6)
    pace = sum(timing["predicted_ms"] / (timing["predicted_n"] - 1) for timing in timings) / 1000
    assert math.isclose(grown("time_per_output_token_seconds_sum", **model), pace, rel_tol=1e-6)
    assert grown("http_requests_total", method="POST", route="/chat/completions", status="200") == 3
    assert grown("http_request_duration_seconds_count", route="/chat/completions") == 3


def test_reuse_of_a_prefix_is_counted(counted: Server) -> None:
    ask(counted, "a long enough beginning", seed=None)
    before = scrape(counted)
    reply = counted.chat("a long enough beginning", temperature=1)
    cached = reply.json["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    after = scrape(counted)
    name = "prompt_tokens_cached_total"
    assert value(after, name, model="fake") - value(before, name, model="fake") == cached


def test_time_in_the_queue_is_measured(counted: Server) -> None:
    before = scrape(counted)
    with counted.connect() as first:
        script = '!{"text": "x", "repeat": 20, "step_ms": 20}'
        body = json.dumps(
            {"model": "fake", "stream": True, "messages": [{"role": "user", "content": script}]}
        ).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(
            body
        )
        first.sendall(head + body)
        assert first.recv(1)  # this request has the only slot
        waited = float(ask(counted, "next").headers["x-queue-ms"])
    after = scrape(counted)
    assert waited > 20
    name = "queue_wait_seconds_sum"
    assert value(after, name, model="fake") - value(before, name, model="fake") >= waited / 1000 * 0.999


def test_errors_are_counted_by_code_and_requests_by_status(counted: Server) -> None:
    before = scrape(counted)
    counted.get("/nowhere")
    counted.request("BREW", "/v1/models")
    counted.request("POST", "/v1/chat/completions", b"{")
    counted.request(
        "POST", "/v1/chat/completions", {"model": "nobody", "messages": [{"role": "user", "content": "a"}]}
    )
    ask(counted, "x" * 5000)
    after = scrape(counted)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("http_requests_total", method="GET", route="none", status="404") == 1
    assert grown("http_requests_total", method="other", route="none", status="405") == 1
    assert grown("http_requests_total", method="POST", route="/chat/completions", status="400") == 2
    assert grown("http_refusals_total", code="invalid_json", status="400") == 1
    assert grown("http_refusals_total", code="model_not_found", status="404") == 1
    assert grown("http_refusals_total", code="context_length_exceeded", status="400") == 1
    assert grown("http_refusals_total", code="not_found_error", status="404") == 1
    assert grown("http_refusals_total", code="method_not_allowed", status="405") == 1


def test_a_client_that_disconnects_before_its_answer(counted: Server) -> None:
    before = scrape(counted)
    labels = {"method": "POST", "route": "/chat/completions", "status": "499"}
    script = '!{"text": "x", "repeat": 100000, "step_ms": 10}'
    body = json.dumps({"model": "fake", "messages": [{"role": "user", "content": script}]}).encode()
    with counted.connect() as leaving:
        leaving.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )
        until(counted, lambda samples: value(samples, "model_requests", model="fake") == 1)
    left = value(before, "http_requests_total", **labels)
    after = until(counted, lambda samples: value(samples, "http_requests_total", **labels) != left)
    assert value(after, "http_requests_total", **labels) == left + 1
    name = "generated_tokens_total"
    assert value(after, name, model="fake") == value(before, name, model="fake")


def test_a_failure_within_a_stream_and_a_workers_death_are_counted() -> None:
    with serve("--engine", "fake", "--log-level", "error") as server:
        events = ask(server, '!{"text": "abcdef", "kill_at": 3}', stream=True).events
        assert events[-1]["error"]["code"] == "worker_died"
        assert ask(server, "well again").json["choices"][0]["message"]["content"] == "well again"
        samples = scrape(server)
        assert value(samples, "http_refusals_total", code="worker_died", status="200") == 1
        assert value(samples, "model_worker_deaths_total", model="fake") == 1
        assert value(samples, "generated_tokens_total", model="fake") == len("well again") + 1


def test_the_models_state_and_memory(counted: Server) -> None:
    samples = scrape(counted)
    assert value(samples, "model_state", model="fake", state="ready") == 1
    states = [key for key in samples if key[0] == "tinyoai_model_state"]
    assert len(states) > 3
    assert sum(samples[key] for key in states) == 1
    assert value(samples, "model_memory_bytes", model="fake") > 1 << 20
    assert value(samples, "model_requests", model="fake") == 0
    assert value(samples, "http_requests_in_flight") == 1
    assert samples["process_resident_memory_bytes", frozenset()] > 1 << 20


def test_openmetrics_if_the_client_accepts_it(counted: Server) -> None:
    reply = counted.request(
        "GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    assert {family.name for family in parse_openmetrics(reply.body.decode())} > {"tinyoai_http_requests"}


def test_every_name_contains_its_unit(counted: Server) -> None:
    families = list(text_string_to_metric_families(counted.get("/metrics").body.decode()))
    for family in families:
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        assert family.name.startswith(("tinyoai_", "process_"))
        assert family.documentation


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['prometheus_client'] = None")
    with serve("--engine", "fake", env=environment(PYTHONPATH=str(tmp_path))) as server:
        assert ask(server, "hello").json["choices"][0]["message"]["content"] == "hello"
        reply = server.get("/metrics")
        assert (reply.status, reply.error["code"]) == (404, "metrics_not_installed")
        assert metrics.INSTALL in reply.error["message"]


def test_the_upper_bound_of_a_bucket_is_inclusive() -> None:
    counted = metrics.Recorder()
    for milliseconds in (5.0, 5.001, 1e9):
        choice = wire.ChoiceDone(
            id=1, choice=0, finish_reason="stop", n_cached=0, n_generated=1, prompt_ms=0, predicted_ms=0
        )
        counted.observe("m", wire.Done(id=1, n_prompt=1, queue_ms=milliseconds), [choice])
    families = text_string_to_metric_families(counted.page("", [], 0)[0].decode())
    first = next(family for family in families if family.name == "tinyoai_time_to_first_token_seconds")
    by_bound = {
        sample.labels["le"]: sample.value for sample in first.samples if sample.name.endswith("_bucket")
    }
    assert (by_bound["0.005"], by_bound["0.01"], by_bound["300.0"], by_bound["+Inf"]) == (1, 2, 2, 3)


def test_every_choice_of_an_answer_counts_its_tokens_and_the_prompt_counts_once() -> None:
    counted = metrics.Recorder()
    choices = [
        wire.ChoiceDone(
            id=1,
            choice=i,
            finish_reason="stop",
            n_cached=i,
            n_generated=n,
            prompt_ms=10 * (i + 1),
            predicted_ms=ms,
        )
        for i, (n, ms) in enumerate([(1, 5.0), (3, 40.0), (0, 0.0)])
    ]
    counted.observe("m", wire.Done(id=1, n_prompt=7, n_cached=2, queue_ms=1000.0), choices)
    counted.observe("m", wire.Done(id=2, n_prompt=5), [])  # an embedding
    families = text_string_to_metric_families(counted.page("", [], 0)[0].decode())
    values = {sample.name: sample.value for family in families for sample in family.samples}
    assert values["tinyoai_prompt_tokens_total"] == 12
    assert values["tinyoai_prompt_tokens_cached_total"] == 2
    assert values["tinyoai_generated_tokens_total"] == 4
    assert values["tinyoai_queue_wait_seconds_count"] == 2
    assert values["tinyoai_time_to_first_token_seconds_count"] == 1
    assert values["tinyoai_time_to_first_token_seconds_sum"] == 1.01
    assert values["tinyoai_time_per_output_token_seconds_count"] == 1
    assert values["tinyoai_time_per_output_token_seconds_sum"] == 0.02
