"""Values as JSON responses can hold them."""

from __future__ import annotations

LOWEST_LOGPROB = -9999.0


def finite_logprob(logprob: float) -> float:
    """`logprob`, but minus infinity (a token that cannot be sampled), which is no JSON number, as `LOWEST_LOGPROB`."""
    return max(logprob, LOWEST_LOGPROB)
