"""What is counted for every generated token: plain numbers, made into metrics when Prometheus asks.

A counter and a histogram of prometheus-client lock and search their buckets one by one at every observation, which for a
stream costs as much as making its text.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString


class TokenCollector(Collector):
    """The number of generated tokens, and a histogram of the times between them. `buckets`: upper bounds in seconds, rising.

    For one event loop's thread.
    """

    def __init__(self, model_name: str, prefix: str, buckets: Sequence[float]) -> None:
        self._model_name = model_name
        self._prefix = prefix
        self._bounds = [*buckets, INF]
        self._num_latencies = [0] * len(self._bounds)
        self._latency_sum = 0.0
        self._num_tokens = 0
        self._created = time.time()

    def add_first(self, num_tokens: int) -> None:
        """The first tokens of a sequence came."""
        self._num_tokens += num_tokens

    def add(self, num_tokens: int, seconds: float) -> None:
        """Further tokens came, each `seconds` after the one before it."""
        self._num_tokens += num_tokens
        self._num_latencies[bisect_left(self._bounds, seconds)] += num_tokens
        self._latency_sum += seconds * num_tokens

    def collect(self) -> Iterator[Metric]:
        """Both families, as prometheus-client's own counter and histogram would show them."""
        counter = CounterMetricFamily(
            self._prefix + "generation_tokens", "Number of generation tokens processed.", labels=["model_name"]
        )
        counter.add_metric([self._model_name], self._num_tokens, created=self._created)
        yield counter
        name = self._prefix + "inter_token_latency_seconds"
        histogram = HistogramMetricFamily(name, "Time between output tokens.", labels=["model_name"])
        total, buckets = 0, []
        for bound, count in zip(self._bounds, self._num_latencies, strict=True):
            total += count
            buckets.append((floatToGoString(bound), total))  # type: ignore[no-untyped-call]
        histogram.add_metric([self._model_name], buckets, self._latency_sum)
        histogram.add_sample(name + "_created", {"model_name": self._model_name}, self._created)
        yield histogram
