"""Metrics: counters and their text for Prometheus. The only importer of prometheus_client.

Counts are plain numbers, added once per request and never per token. The client library is an optional extra that
takes a tenth of a second to import, so the first scrape imports it; it only formats what was counted here.
"""

import importlib.util
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from tinyoai import __version__, wire

if TYPE_CHECKING:
    from prometheus_client.metrics_core import HistogramMetricFamily, Metric

INSTALL = "pip install 'tinyoai[metrics]'"

# from a desktop with a tiny model to a Raspberry Pi with one that barely fits
_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_WAIT = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_REQUEST = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds, in seconds."""

_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
_CLIENT_LEFT = 499
"""nginx's status of a request whose client disconnected before there was an answer."""


def available() -> bool:
    """Returns whether the client library is installed. Does not import it."""
    return importlib.util.find_spec("prometheus_client") is not None


def prepare() -> None:
    """Imports the client library. This takes up to a tenth of a second, so do not call it in an event loop."""
    import prometheus_client  # noqa: F401


class ModelSample(msgspec.Struct, frozen=True, kw_only=True):
    """A model at the time of a scrape."""

    name: str
    state: str
    states: Sequence[str]
    """All possible states."""
    memory: int | None
    """Bytes of resident memory; None: no process."""
    n_deaths: int
    """Times that its process ended by itself."""
    n_requests: int
    """Requests that use the model now."""


class EndedExchange(Protocol):
    """The attributes of an HTTP exchange that are counted."""

    route: str
    status: int
    refusal: str

    @property
    def method(self) -> str:
        """The request's method."""

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the request's head."""


class _Histogram:
    """A histogram for each value of one label."""

    __slots__ = ("_bounds", "_rows")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._rows: dict[str, tuple[list[int], list[float]]] = {}

    def observe(self, label: str, value: float) -> None:
        row = self._rows.get(label)
        if row is None:
            row = self._rows[label] = ([0] * (len(self._bounds) + 1), [0.0])
        row[0][bisect_left(self._bounds, value)] += 1
        row[1][0] += value

    def fill(self, family: "HistogramMetricFamily") -> "HistogramMetricFamily":
        names = [*(str(bound) for bound in self._bounds), "+Inf"]
        for label, (counts, total) in self._rows.items():
            so_far, buckets = 0, []
            for name, count in zip(names, counts, strict=True):
                so_far += count
                buckets.append((name, float(so_far)))
            family.add_metric([label], buckets=buckets, sum_value=total[0])
        return family


class Recorder:
    """Records requests and answers since the server's start."""

    def __init__(self) -> None:
        # HTTP requests
        self._requests: dict[tuple[str, str, int], int] = {}
        self._refusals: dict[tuple[str, int], int] = {}
        self._durations = _Histogram(_REQUEST)
        # answers by model
        self._first_token = _Histogram(_FIRST_TOKEN)
        self._per_token = _Histogram(_TOKEN)
        self._waits = _Histogram(_WAIT)
        self._tokens: dict[str, list[int]] = {}

    def exchange_ended(self, exchange: "EndedExchange") -> None:
        """Counts an HTTP exchange that has ended, answered or not."""
        self.request(
            exchange.method, exchange.route, exchange.status, exchange.elapsed_ms / 1000.0, exchange.refusal
        )

    def request(self, method: str, route: str, status: int, seconds: float, refusal: str = "") -> None:
        """Counts a request that has ended. `refusal` is the code of its error body, if it got one."""
        status = status or _CLIENT_LEFT
        key = (method if method in _METHODS else "other", route or "none", status)
        self._requests[key] = self._requests.get(key, 0) + 1
        self._durations.observe(key[1], seconds)
        if refusal:
            self._refusals[refusal, status] = self._refusals.get((refusal, status), 0) + 1

    def observe(self, model: str, done: wire.Done, choices: Sequence[wire.ChoiceDone]) -> None:
        """Counts a model's complete answer. An embedding has no choices."""
        self._waits.observe(model, done.queue_ms / 1000.0)
        generated = [choice for choice in choices if choice.n_generated]
        if generated:
            prompt_ms = min(choice.prompt_ms for choice in generated)
            self._first_token.observe(model, (done.queue_ms + prompt_ms) / 1000.0)
        for choice in generated:
            if choice.n_generated > 1:
                self._per_token.observe(model, choice.predicted_ms / 1000.0 / (choice.n_generated - 1))
        tokens = self._tokens.setdefault(model, [0, 0, 0])
        tokens[0] += done.n_prompt
        tokens[1] += done.n_cached
        tokens[2] += sum(choice.n_generated for choice in choices)

    def page(self, accept: str, models: Sequence[ModelSample], n_in_flight: int) -> tuple[bytes, str]:
        """The metrics page in a format that `accept` allows, and its content type."""
        from prometheus_client import CollectorRegistry, ProcessCollector
        from prometheus_client.exposition import choose_encoder
        from prometheus_client.registry import Collector

        families = list(self._families(models, n_in_flight))

        class _Families(Collector):
            def collect(self) -> Iterable["Metric"]:
                return families

        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Families())
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    def _families(self, models: Sequence[ModelSample], n_in_flight: int) -> Iterator["Metric"]:
        from prometheus_client.metrics_core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
            InfoMetricFamily,
        )

        yield InfoMetricFamily("tinyoai_build", "The server's version", value={"version": __version__})

        requests = CounterMetricFamily(
            "tinyoai_http_requests",
            "Requests that have ended; 499: the client disconnected before the answer",
            labels=["method", "route", "status"],
        )
        for (method, route, status), count in self._requests.items():
            requests.add_metric([method, route, str(status)], count)
        yield requests
        refusals = CounterMetricFamily(
            "tinyoai_http_refusals",
            "Refused and failed requests by the code in the error body",
            labels=["code", "status"],
        )
        for (code, status), count in self._refusals.items():
            refusals.add_metric([code, str(status)], count)
        yield refusals
        yield GaugeMetricFamily(
            "tinyoai_http_requests_in_flight", "Requests in progress, including the scrape", value=n_in_flight
        )

        for name, help_text, label, histogram in (
            ("http_request_duration_seconds", "Time from head to end of answer", "route", self._durations),
            ("queue_wait_seconds", "Time in the queue for a slot of the model", "model", self._waits),
            ("time_to_first_token_seconds", "Time in the queue and in prefill", "model", self._first_token),
            ("time_per_output_token_seconds", "Mean over an answer after the first token", "model", self._per_token),
        ):  # fmt: skip
            yield histogram.fill(HistogramMetricFamily(f"tinyoai_{name}", help_text, labels=[label]))

        for index, (name, help_text) in enumerate(
            (
                ("prompt_tokens", "Prompt tokens of complete answers"),
                ("prompt_tokens_cached", "Prompt tokens that were in the KV cache"),
                ("generated_tokens", "Generated tokens of complete answers"),
            )
        ):
            family = CounterMetricFamily(f"tinyoai_{name}", help_text, labels=["model"])
            for model, tokens in self._tokens.items():
                family.add_metric([model], tokens[index])
            yield family

        yield from _of_models(models)


def _of_models(models: Sequence[ModelSample]) -> Iterator["Metric"]:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    state = GaugeMetricFamily(
        "tinyoai_model_state", "1 for the current state of the model, else 0", labels=["model", "state"]
    )
    memory = GaugeMetricFamily(
        "tinyoai_model_memory_bytes", "Resident memory of the model's process", labels=["model"]
    )
    active = GaugeMetricFamily("tinyoai_model_requests", "Requests that use the model", labels=["model"])
    restarts = CounterMetricFamily(
        "tinyoai_model_worker_deaths", "Times that the model's process ended by itself", labels=["model"]
    )
    for model in models:
        for name in model.states:
            state.add_metric([model.name, name], float(name == model.state))
        if model.memory is not None:
            memory.add_metric([model.name], model.memory)
        active.add_metric([model.name], model.n_requests)
        restarts.add_metric([model.name], model.n_deaths)
    yield from (state, memory, active, restarts)
