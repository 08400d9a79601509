"""Requests and tokens a minute: what is left, what is refused and until when, and what a client is told."""

from __future__ import annotations

import pytest

from pagoda.errors import RateLimitError
from pagoda.serving.rate_limits import RateLimiter
from pagoda.serving.status import report
from pagoda.tenants import UNLIMITED, TenantLimits
from tests.support.virtual_time import Clock

LIMITS = TenantLimits(requests_per_minute=3, tokens_per_minute=600)


def test_requests_are_refused_until_there_is_one_again() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    for _ in range(3):
        limiter.admit("a", LIMITS)
    with pytest.raises(
        RateLimitError, match=r"requests per minute: the limit of this API key is 3. Please try again in 20s"
    ):
        limiter.admit("a", LIMITS)
    limiter.admit("b", LIMITS)
    clock.advance(19.0)
    with pytest.raises(RateLimitError) as caught:
        limiter.admit("a", LIMITS)
    failure = report(caught.value)
    assert (
        failure.http_status,
        failure.grpc_code,
        str(failure.kind),
        failure.openai_type,
        failure.retry_after_seconds,
    ) == (
        429,
        "RESOURCE_EXHAUSTED",
        "rate_limit_exceeded",
        "requests",
        1,
    )
    clock.advance(1.0)
    limiter.admit("a", LIMITS)


def test_a_debt_of_tokens_is_paid_before_the_next_request() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    limiter.admit("a", LIMITS)
    limiter.count_tokens("a", LIMITS, 900)
    with pytest.raises(RateLimitError, match="tokens per minute") as caught:
        limiter.admit("a", LIMITS)
    assert caught.value.retry_after_seconds == 31
    clock.advance(31.0)
    limiter.admit("a", LIMITS)


def test_headers_are_those_of_openai() -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    limiter.admit("a", LIMITS)
    limiter.count_tokens("a", LIMITS, 1000)
    assert limiter.headers("a", LIMITS) == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "20s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m40s",
    }
    assert limiter.headers("b", UNLIMITED) == {}
    clock.advance(99.5)
    assert limiter.headers("a", LIMITS)["x-ratelimit-reset-tokens"] == "500ms"


def test_a_limit_that_changes_keeps_what_was_used_and_one_that_goes_is_none() -> None:
    limiter = RateLimiter(Clock())
    for _ in range(3):
        limiter.admit("a", LIMITS)
    larger = TenantLimits(requests_per_minute=5)
    for _ in range(2):
        limiter.admit("a", larger)
    with pytest.raises(RateLimitError):
        limiter.admit("a", larger)
    for _ in range(1000):
        limiter.admit("a", UNLIMITED)


def test_tenants_without_use_are_forgotten(monkeypatch) -> None:
    monkeypatch.setattr("pagoda.serving.rate_limits.MAX_KNOWN", 100)
    clock = Clock()
    limiter = RateLimiter(clock)
    limiter.admit("busy", TenantLimits(requests_per_minute=1))
    for index in range(1000):
        limiter.admit(f"t{index}", TenantLimits(requests_per_minute=100))
        clock.advance(0.7)
        if index == 50:
            limiter.admit("busy", UNLIMITED)
    assert len(limiter._buckets) <= 102
