"""Retry-After is what the engine's pace says, whatever came before."""

from __future__ import annotations

import pytest

from pagoda.engine.client.service_rate import ServiceRate


def serve(rate: ServiceRate, per_second: float, seconds: float, start: float = 1000.0) -> float:
    """Requests end at an even pace; the time of the last."""
    rate.resume(start)
    now = start
    for number in range(1, int(per_second * seconds) + 1):
        now = start + number / per_second
        rate.count(now)
    return now


@pytest.mark.parametrize("seconds", [2, 10, 600])
@pytest.mark.parametrize(
    ("per_second", "num_waiting", "expected"), [(10, 100, 10), (2, 60, 30), (100, 3, 1), (1, 999, 60)]
)
def test_waiting_takes_as_long_as_the_measured_pace_says(
    per_second: float, seconds: float, num_waiting: int, expected: int
) -> None:
    rate = ServiceRate()
    serve(rate, per_second, seconds)
    assert rate.seconds_until_served(num_waiting) == pytest.approx(expected, abs=1)


def test_a_pace_that_changes_is_followed() -> None:
    rate = ServiceRate()
    now = serve(rate, 100, 60)
    serve(rate, 1, 120, start=now)
    assert rate.seconds_until_served(10) == pytest.approx(10, abs=1)


def test_idle_hours_do_not_make_the_engine_look_slow() -> None:
    rate = ServiceRate()
    now = serve(rate, 10, 60)
    serve(rate, 10, 1, start=now + 7200)
    assert rate.seconds_until_served(100) == pytest.approx(10, abs=1)


def test_many_at_once_are_many() -> None:
    rate = ServiceRate()
    rate.resume(0.0)
    for second in range(1, 11):
        for _ in range(20):
            rate.count(float(second))
    assert rate.seconds_until_served(100) == pytest.approx(5, abs=1)


def test_before_anything_was_measured_a_second_is_as_good_as_any() -> None:
    assert ServiceRate().seconds_until_served(1000) == 1
