"""The arithmetic of benchmark figures, against hand-made records and numpy."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.benchmarking.load import ClientLoad
from pagoda.benchmarking.metrics import ServiceLevel, max_concurrent, percentile, summarize, summary
from pagoda.benchmarking.plot import load_plot, round_ticks
from pagoda.benchmarking.records import RequestRecord
from pagoda.benchmarking.report import client_figures
from pagoda.errors import InvalidRequestError


def record(scheduled=0.0, sent=None, times=(), ended=None, tokens=None, error=None) -> RequestRecord:
    return RequestRecord(
        conversation=0,
        turn=0,
        scheduled=scheduled,
        sent=scheduled if sent is None else sent,
        event_times=list(times),
        ended=times[-1] if ended is None else ended,
        output_tokens=len(times) if tokens is None else tokens,
        prompt_tokens=10,
        error=error,
    )


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


def test_no_values_give_no_figures():
    assert math.isnan(percentile([], 50))
    assert set(summary([]).values()) == {None}
    assert summarize([])["request_throughput"] == 0.0


def test_latencies_count_from_the_planned_moment_and_lateness_shows():
    late = record(scheduled=1.0, sent=1.25, times=[2.0, 2.5, 3.0])
    assert late.ttft == 1.0
    assert late.e2el == 2.0
    assert late.tpot == 0.5
    assert late.itls == [0.5, 0.5]
    figures = client_figures(ClientLoad(), [late])
    assert figures["lateness_ms"]["max"] == pytest.approx(250)
    assert figures["is_slow"]


def test_pieces_of_several_tokens_count_as_their_tokens():
    assert record(times=[1.0, 3.0], tokens=5).tpot == 0.5
    assert record(times=[1.0], tokens=5).tpot is None
    assert record(times=[1.0, 2.0], tokens=1).tpot is None


def test_an_answer_without_text_has_its_end_as_first_token():
    assert record(scheduled=1.0, times=[], ended=4.0, tokens=3).ttft == 3.0


def test_failed_requests_count_as_errors_and_nowhere_else():
    figures = summarize([record(times=[1.0, 2.0]), record(times=[], ended=50.0, error="timeout")])
    assert figures["errors"] == {"timeout": 1}
    assert figures["e2el_ms"]["max"] == 2000
    assert figures["output_tokens"] == 2
    assert figures["duration_seconds"] == 50.0


def test_concurrency_is_the_most_at_once():
    assert max_concurrent([record(0.0, times=[2.0]), record(1.0, times=[3.0]), record(2.0, times=[4.0])]) == 2


def test_a_service_level_is_met_within_all_limits_only():
    level = ServiceLevel.parse(["ttft:1000", "tpot:500"])
    assert level.is_met_by(record(times=[1.0, 1.5]))
    assert not level.is_met_by(record(times=[1.125, 1.5]))
    assert not level.is_met_by(record(times=[1.0, 1.75]))
    assert level.is_met_by(record(times=[1.0]))  # one token: no tpot to exceed
    assert not level.is_met_by(record(times=[0.5], error="HTTP 500"))


@pytest.mark.parametrize("word", ["itl:3", "ttft", "ttft:", "ttft:x", "ttft:-1", "ttft:inf", "ttft:nan"])
def test_a_wrong_service_level_is_refused_with_what_was_written(word):
    with pytest.raises(InvalidRequestError, match="goodput"):
        ServiceLevel.parse([word])


def test_the_plot_is_an_image_with_a_panel_for_each_metric_that_has_values():
    root = ElementTree.fromstring(load_plot([record(times=[1.0, 2.0, 2.5]), record(0.5, times=[3.0, 4.0])], "a < b"))
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 5
    only_whole = ElementTree.fromstring(load_plot([record(times=[1.0])], "one"))
    assert len([element for element in only_whole.iter() if element.tag.endswith("polyline")]) == 3


def test_the_plot_says_what_its_axes_are_and_marks_the_median_and_the_worst():
    records = [record(times=[float(second)]) for second in range(1, 102)]
    root = ElementTree.fromstring(load_plot(records, "one"))
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    for text in (
        "ttft: time to first token",
        "milliseconds",
        "% of values",
        "seconds since the first was sent",
        "requests",
    ):
        assert text in words
    (median, worst) = [word for word in words if word.startswith("p")][:2]
    assert (median, worst) == ("p50 51000 ms", "p99 100000 ms")


@pytest.mark.parametrize(
    ("highest", "ticks"),
    [
        (100, [0, 20, 40, 60, 80, 100]),
        (7, [0, 2, 4, 6, 8]),
        (0.3, [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]),
        (1234, [0, 500, 1000, 1500]),
        (5, [0, 1, 2, 3, 4, 5]),
        (0, [0, 1]),
        (float("nan"), [0, 1]),
    ],
)
def test_ticks_are_round(highest, ticks):
    assert round_ticks(highest) == pytest.approx(ticks)
