"""Requests and tokens a minute, by tenant: buckets that fill continuously and hold a minute's worth.

A request is admitted while its tenant has a request and any tokens left. Tokens are counted as they are computed, those of a
prompt with the first of its answer, so a long answer may leave a debt, and the next request waits until it is paid.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from pagoda.errors import RateLimitError
from pagoda.tenants import TenantLimits

SECONDS = 60.0
MAX_KNOWN = 10_000
"""Tenants beyond these are looked through for such that have a whole minute's worth again, and forgotten."""


@dataclass(slots=True)
class _Bucket:
    """`limit` a minute; `level` as of `filled_at`."""

    limit: int
    level: float
    filled_at: float

    def fill(self, limit: int, now: float) -> None:
        """Bring it up to now; a limit that has changed keeps what was used."""
        self.level += limit - self.limit
        self.limit = limit
        self.level = min(limit, self.level + (now - self.filled_at) * limit / SECONDS)
        self.filled_at = now

    def seconds_until(self, level: float) -> float:
        return max(0.0, round((level - self.level) * SECONDS / self.limit, 3))


class RateLimiter:
    """What each tenant has left. `clock`: seconds that never go back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, dict[str, _Bucket]] = {}  # by tenant: those of its limits, `requests` and `tokens`

    def admit(self, tenant: str, limits: TenantLimits) -> None:
        """Count a request. Raises `RateLimitError`, and counts nothing, where the tenant has used what it has a minute."""
        buckets = self._filled(tenant, limits)
        for what, bucket in buckets.items():
            seconds = bucket.seconds_until(1)
            if seconds > 0:
                raise RateLimitError(
                    f"Rate limit reached for {what} per minute: the limit of this API key is {bucket.limit}. "
                    f"Please try again in {seconds:.3g}s.",
                    what,
                    max(1, ceil(seconds)),
                )
        if "requests" in buckets:
            buckets["requests"].level -= 1

    def count_tokens(self, tenant: str, limits: TenantLimits, num_tokens: int) -> None:
        """Take tokens that were computed."""
        bucket = self._filled(tenant, limits).get("tokens")
        if bucket is not None:
            bucket.level -= num_tokens

    def headers(self, tenant: str, limits: TenantLimits) -> dict[str, str]:
        """OpenAI's headers of a response: limit, what remains, and when all of it is there again."""
        headers = {}
        for what, bucket in self._filled(tenant, limits).items():
            headers[f"x-ratelimit-limit-{what}"] = str(bucket.limit)
            headers[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.level)))
            headers[f"x-ratelimit-reset-{what}"] = _duration(bucket.seconds_until(bucket.limit))
        return headers

    def _filled(self, tenant: str, limits: TenantLimits) -> dict[str, _Bucket]:
        """The buckets of a tenant as of now; none for limits that it does not have."""
        wanted = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
        now = self._clock()
        known = self._buckets.get(tenant, {})
        buckets = {}
        for what, limit in wanted.items():
            if limit is not None:
                bucket = buckets[what] = known.get(what) or _Bucket(limit, limit, now)
                bucket.fill(limit, now)
        if buckets:
            self._buckets[tenant] = buckets
            if len(self._buckets) > MAX_KNOWN:
                self._forget_full(now)
        return buckets

    def _forget_full(self, now: float) -> None:
        for tenant, buckets in list(self._buckets.items()):
            if all(now - bucket.filled_at >= bucket.seconds_until(bucket.limit) for bucket in buckets.values()):
                del self._buckets[tenant]


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 1m12.5s, 6s, 340ms."""
    if seconds < 1:
        return f"{ceil(1000 * seconds)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"
