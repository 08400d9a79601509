"""What is read of a scrape of `/metrics`."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from pagoda.monitoring.samples import Samples, rate
from pagoda.serving.metrics.prometheus import Metrics
from tests.support.fake_engine import FakeEngineClient

BOUNDS = (1.0, 2.0, 5.0, 10.0)


def scraped(values: list[float]) -> Samples:
    registry = CollectorRegistry()
    histogram = Histogram("p_x", "x", ["model_name"], buckets=BOUNDS, registry=registry)
    for value in values:
        histogram.labels("m").observe(value)
    mark = '# TYPE p_engine_state_transitions counter\np_engine_state_transitions_total{from="a",to="b"} 0.0\n'
    return Samples(generate_latest(registry).decode() + mark)


@settings(max_examples=60)
@given(st.lists(st.floats(0, 9.9), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_a_quantile_is_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    found = scraped(values).histogram("x")
    assert found is not None
    assert found.count == len(values)
    true = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    low = max((bound for bound in (0.0, *BOUNDS) if bound < true), default=0.0)
    high = min(bound for bound in BOUNDS if bound >= true)
    quantile = found.quantile(share)
    assert quantile is not None
    assert low - 1e-9 <= quantile <= high + 1e-9
    for limit in BOUNDS:
        assert found.share_below(limit) == pytest.approx(sum(value <= limit for value in values) / len(values))


def test_a_histogram_since_another() -> None:
    early, late = scraped([0.5, 20.0]).histogram("x"), scraped([0.5, 20.0, 3.0, 4.0]).histogram("x")
    assert early is not None
    assert late is not None
    assert late.minus(early).counts == (0, 0, 2, 0, 0)
    assert late.minus(early).mean == 3.5
    assert early.minus(late) is early  # the server began anew
    assert late.quantile(1.0) == 10.0  # what is beyond the last bound is at least that
    empty = late.minus(late)
    assert (empty.quantile(0.5), empty.share_below(1.0), empty.mean) == (None, None, None)


@pytest.mark.parametrize("prefix", ["pagoda_", "vllm:", "my_"])
def test_names_are_without_the_prefix_whatever_it_is(prefix: str) -> None:
    metrics = Metrics("m", prefix)
    metrics.watch(FakeEngineClient())
    metrics.time_to_first_token.observe(0.2)
    samples = Samples(metrics.render()[0].decode())
    assert (samples.prefix, samples.models) == (prefix, ["m"])
    assert samples.by("engine_state", "state")["starting"] == 1
    histogram = samples.histogram("time_to_first_token_seconds")
    assert histogram is not None
    assert histogram.count == 1
    assert samples.value("no_such_thing") is None


def test_another_server_is_told_from_ours() -> None:
    with pytest.raises(ValueError, match="not those of a Pagoda server"):
        Samples("# TYPE up gauge\nup 1.0\n")


def test_a_counter_that_began_anew_has_grown_by_its_value() -> None:
    assert rate(30.0, 10.0, 2.0) == 10.0
    assert rate(4.0, 10.0, 2.0) == 2.0
    assert rate(None, 1.0, 1.0) is None
    assert rate(1.0, 1.0, 0.0) is None
