"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moac_runtime.engine.turn import Turn
from moac_runtime.serve.engine_thread import EngineThread, State

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class RequestMetrics:
    """Counts requests; with a registry of its own, so that several servers share a process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "moac_requests", "HTTP requests", ("path", "status"), registry=self._registry
        )

    def count(self, path: str, status: int) -> None:
        """A request that was replied to."""
        self._requests.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """All of it in the text format."""
        return generate_latest(self._registry)


class Metrics(RequestMetrics):
    """What an engine and its answers count too."""

    def __init__(self, thread: EngineThread, kv_limit: int | None) -> None:
        super().__init__()
        self._registry.register(_EngineCollector(thread, kv_limit))
        self._first = Histogram(
            "moac_time_to_first_token_seconds",
            "From a request to its first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._between = Histogram(
            "moac_time_per_output_token_seconds",
            "Between the tokens of an answer, its mean",
            buckets=(0.001, 0.0025, 0.005, *_SECONDS[:8]),
            registry=self._registry,
        )

    def note(self, turn: Turn) -> None:
        """An answer that has ended."""
        if turn.first_token_s is not None:
            self._first.observe(turn.first_token_s)
        if speed := turn.decode_tokens_per_s:
            self._between.observe(1 / speed)


class _EngineCollector(Collector):
    """The engine's counts, as they stood after its last step."""

    def __init__(self, thread: EngineThread, kv_limit: int | None) -> None:
        self._thread, self._kv_limit = thread, kv_limit

    def collect(self) -> Iterator[Metric]:
        """Counters, then gauges."""
        state = self._thread.state
        for name, told, count in _counters(state):
            yield CounterMetricFamily(f"moac_{name}", told, value=count)
        for name, told, value in _gauges(state):
            yield GaugeMetricFamily(f"moac_{name}", told, value=value)
        if self._kv_limit is not None:
            told = "Most bytes of keys and values of all rows"
            yield GaugeMetricFamily("moac_kv_limit_bytes", told, value=self._kv_limit)


def _counters(state: State) -> list[tuple[str, str, float]]:
    totals = state.totals
    return [
        ("prompt_tokens_read", "Prompt tokens that were computed", totals.read),
        ("prompt_tokens_reused", "Prompt tokens that kept caches held", totals.reused),
        ("answer_tokens", "Tokens that were chosen", totals.chosen),
        ("steps", "Steps of the engine", totals.steps),
        ("sequences_finished", "Sequences that ended by themselves", totals.finished),
        ("sequences_cancelled", "Sequences whose client went away", totals.cancelled),
        ("sequences_failed", "Sequences that ended by a fault", totals.failed),
        ("kept_evicted", "Kept caches that made way for others", state.evicted),
    ]


def _gauges(state: State) -> list[tuple[str, str, float]]:
    return [
        ("sequences_running", "Sequences that have a row", state.running),
        ("sequences_waiting", "Sequences that wait for one", state.waiting),
        ("sequences_peak", "Most sequences that had a row at once", state.totals.rows),
        ("kv_bytes", "Bytes of keys and values of all rows", state.kv_bytes),
        ("kv_peak_bytes", "Most bytes of keys and values of all rows at once", state.totals.held),
        ("kept_bytes", "Bytes of kept caches", state.kept_bytes),
        ("kept_caches", "Kept caches", state.kept_caches),
    ]
