"""Figures kept as plain numbers show what prometheus-client's own counter and histogram would."""

from __future__ import annotations

import random

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pagoda.serving.metrics.prometheus import INTER_TOKEN_LATENCY_BUCKETS
from pagoda.serving.metrics.token_collector import TokenCollector


def exposition(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    return {
        (family.type, family.documentation, sample.name, *sorted(sample.labels.items())): round(sample.value, 6)
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_it_shows_what_a_counter_and_a_histogram_would() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    collector = TokenCollector("a model", "p_", INTER_TOKEN_LATENCY_BUCKETS)
    ours.register(collector)
    counter = Counter("p_generation_tokens", "Number of generation tokens processed.", ["model_name"], registry=theirs)
    histogram = Histogram(
        "p_inter_token_latency_seconds",
        "Time between output tokens.",
        ["model_name"],
        buckets=INTER_TOKEN_LATENCY_BUCKETS,
        registry=theirs,
    )
    collector.add_first(3)
    counter.labels("a model").inc(3)
    rng = random.Random(0)
    for seconds in [*INTER_TOKEN_LATENCY_BUCKETS, 0.0, 1e6, *(rng.expovariate(10) for _ in range(500))]:
        count = rng.randint(1, 4)
        collector.add(count, seconds)
        counter.labels("a model").inc(count)
        for _ in range(count):
            histogram.labels("a model").observe(seconds)
    assert exposition(ours) == exposition(theirs)
    names = {sample.name for family in collector.collect() for sample in family.samples}
    assert {"p_generation_tokens_created", "p_inter_token_latency_seconds_created"} <= names
