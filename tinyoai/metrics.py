"""What is measured, and how Prometheus reads it. The only door to prometheus_client.

Owns the names, units and buckets, and the sums behind them: plain numbers, added up once per request
and never per token. The client library is an optional extra; it is imported by the first scrape, since
it costs a start more than a tenth of it, and only words what was counted here. Without it nothing is
counted. It must not know where the numbers come from.
"""

import importlib.util
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from tinyoai import __version__

if TYPE_CHECKING:
    from prometheus_client.metrics_core import HistogramMetricFamily, Metric

INSTALL = "pip install 'tinyoai[metrics]'"

# from a desktop with a tiny model to a Raspberry Pi with one that hardly fits
_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_WAIT = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_REQUEST = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds, in seconds."""

_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
_LEFT = 499
"""The status, borrowed from nginx, of a request whose client left before there was one."""


def available() -> bool:
    """Whether the client library is installed; it is not imported for that."""
    return importlib.util.find_spec("prometheus_client") is not None


def prepare() -> None:
    """Imports the client library: a tenth of a second where it is slow, so no work for an event loop."""
    import prometheus_client  # noqa: F401


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is at the moment of a scrape."""

    name: str
    state: str
    states: Sequence[str]
    """Every state there is."""
    memory: int | None
    """Bytes that its process holds; None: it has none."""
    n_deaths: int
    """How often its process ended by itself."""
    n_requests: int
    """Requests that hold the model."""


class _Histogram:
    """Counts by upper bound, for each value of one label."""

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


class Metrics:
    """Everything that was counted since the start."""

    def __init__(self) -> None:
        # of requests
        self._requests: dict[tuple[str, str, int], int] = {}
        self._refusals: dict[tuple[str, int], int] = {}
        self._durations = _Histogram(_REQUEST)
        # of answers, by model
        self._first_token = _Histogram(_FIRST_TOKEN)
        self._per_token = _Histogram(_TOKEN)
        self._waits = _Histogram(_WAIT)
        self._tokens: dict[str, list[int]] = {}

    def request(self, method: str, route: str, status: int, seconds: float, refusal: str = "") -> None:
        """A request has ended. `refusal`: the code of its error body, if it got one."""
        status = status or _LEFT
        key = (method if method in _METHODS else "other", route or "none", status)
        self._requests[key] = self._requests.get(key, 0) + 1
        self._durations.observe(key[1], seconds)
        if refusal:
            self._refusals[refusal, status] = self._refusals.get((refusal, status), 0) + 1

    def answer(
        self,
        model: str,
        *,
        n_prompt: int,
        n_cached: int,
        n_generated: int,
        queue_ms: float,
        prompt_ms: float,
        predicted_ms: float,
    ) -> None:
        """A model's answer is complete. Counts are of tokens, times as wire.Done has them."""
        self._waits.observe(model, queue_ms / 1000.0)
        if n_generated:  # an embedding has none
            self._first_token.observe(model, (queue_ms + prompt_ms) / 1000.0)
        if n_generated > 1:
            self._per_token.observe(model, predicted_ms / 1000.0 / (n_generated - 1))
        tokens = self._tokens.setdefault(model, [0, 0, 0])
        tokens[0] += n_prompt
        tokens[1] += n_cached
        tokens[2] += n_generated

    def page(self, accept: str, models: Sequence[Model], n_in_flight: int) -> tuple[bytes, str]:
        """What a scrape gets, in the form it accepts, and its content type."""
        from prometheus_client import CollectorRegistry, ProcessCollector
        from prometheus_client.exposition import choose_encoder
        from prometheus_client.registry import Collector

        families = list(self._families(models, n_in_flight))

        class _Ready(Collector):
            def collect(self) -> Iterable["Metric"]:
                return families

        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Ready())
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    def _families(self, models: Sequence[Model], n_in_flight: int) -> Iterator["Metric"]:
        from prometheus_client.metrics_core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
            InfoMetricFamily,
        )

        yield InfoMetricFamily("tinyoai_build", "The server's version", value={"version": __version__})

        requests = CounterMetricFamily(
            "tinyoai_http_requests",
            "Requests that have ended; 499: the client left before it was answered",
            labels=["method", "route", "status"],
        )
        for (method, route, status), count in self._requests.items():
            requests.add_metric([method, route, str(status)], count)
        yield requests
        refusals = CounterMetricFamily(
            "tinyoai_http_refusals",
            "Requests that were refused or failed, by the code in their error body",
            labels=["code", "status"],
        )
        for (code, status), count in self._refusals.items():
            refusals.add_metric([code, str(status)], count)
        yield refusals
        yield GaugeMetricFamily(
            "tinyoai_http_requests_in_flight", "Requests under way, the scrape among them", value=n_in_flight
        )

        for name, what, label, histogram in (
            ("http_request_duration_seconds", "Head to end of answer", "route", self._durations),
            ("queue_wait_seconds", "Wait for a slot of the model", "model", self._waits),
            ("time_to_first_token_seconds", "Wait for a slot, and prefill", "model", self._first_token),
            ("time_per_output_token_seconds", "Mean over an answer after its first token", "model", self._per_token),
        ):  # fmt: skip
            yield histogram.fill(HistogramMetricFamily(f"tinyoai_{name}", what, labels=[label]))

        for at, (name, what) in enumerate(
            (
                ("prompt_tokens", "Tokens of the prompts of finished answers"),
                ("prompt_tokens_cached", "Those among them that were still in a slot"),
                ("generated_tokens", "Tokens of finished answers"),
            )
        ):
            family = CounterMetricFamily(f"tinyoai_{name}", what, labels=["model"])
            for model, tokens in self._tokens.items():
                family.add_metric([model], tokens[at])
            yield family

        yield from _of_models(models)


def _of_models(models: Sequence[Model]) -> Iterator["Metric"]:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    state = GaugeMetricFamily(
        "tinyoai_model_state", "1 for the state that it is in", labels=["model", "state"]
    )
    memory = GaugeMetricFamily(
        "tinyoai_model_memory_bytes", "Resident memory of its process", labels=["model"]
    )
    active = GaugeMetricFamily("tinyoai_model_requests", "Requests that hold the model", labels=["model"])
    restarts = CounterMetricFamily(
        "tinyoai_model_worker_deaths", "How often its process ended by itself", labels=["model"]
    )
    for model in models:
        for name in model.states:
            state.add_metric([model.name, name], float(name == model.state))
        if model.memory is not None:
            memory.add_metric([model.name], model.memory)
        active.add_metric([model.name], model.n_requests)
        restarts.add_metric([model.name], model.n_deaths)
    yield from (state, memory, active, restarts)
