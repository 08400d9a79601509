"""From records to figures: percentiles, rates, goodput, errors by kind. Latencies are in milliseconds from here on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagoda.benchmarking.records import RequestRecord
from pagoda.errors import InvalidRequestError

PERCENTILES = (50, 90, 99)
METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
MILLISECONDS = 1000.0
MOST_PIECES = 2000
"""Inter-token latencies that a result keeps, at equal ranks, where there are more."""


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """The most that each metric may be for a request to count as good, in milliseconds."""

    limits: Mapping[str, float]

    @classmethod
    def parse(cls, words: Sequence[str]) -> ServiceLevel:
        """`["ttft:200", "tpot:50"]`. Raises `InvalidRequestError` saying what may be written."""
        limits = {}
        for word in words:
            name, colon, value = word.partition(":")
            if name not in GOODPUT_METRICS or not colon:
                raise InvalidRequestError(
                    f"--goodput {word!r}: write NAME:MILLISECONDS with a name of {', '.join(GOODPUT_METRICS)}"
                )
            try:
                limits[name] = float(value)
            except ValueError:
                raise InvalidRequestError(f"--goodput {word!r}: {value!r} is no number of milliseconds") from None
            if not 0 < limits[name] < math.inf:
                raise InvalidRequestError(f"--goodput {word!r}: the limit must be above 0 and finite")
        return cls(limits)

    def is_met_by(self, record: RequestRecord) -> bool:
        """Whether the request succeeded within every limit; an answer of one token has no tpot to exceed."""
        if record.error is not None:
            return False
        values = {"ttft": record.ttft, "tpot": record.tpot, "e2el": record.e2el}
        return all((values[name] or 0.0) * MILLISECONDS <= limit for name, limit in self.limits.items())


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile by linear interpolation between the two nearest ranks, as numpy has it. NaN without values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summary(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, percentiles and extremes of `values`, in their unit; None without values."""
    names = ("mean", *(f"p{percent}" for percent in PERCENTILES), "max")
    if not values:
        return dict.fromkeys(names)
    figures = [percentile(values, percent) for percent in PERCENTILES]
    return dict(zip(names, (sum(values) / len(values), *figures, max(values)), strict=True))


def latencies(records: Sequence[RequestRecord]) -> dict[str, list[float]]:
    """Every metric's values over the requests that succeeded, in milliseconds."""
    good = [record for record in records if record.error is None]
    seconds = {
        "ttft": [record.ttft for record in good],
        "tpot": [record.tpot for record in good if record.tpot is not None],
        "itl": [gap for record in good for gap in record.itls],
        "e2el": [record.e2el for record in good],
    }
    return {name: [value * MILLISECONDS for value in values] for name, values in seconds.items()}


def by_request(records: Sequence[RequestRecord]) -> dict[str, list[float | None]]:
    """Of every request that succeeded what a service level may bound, in milliseconds; `itl` of all pieces."""
    good = [record for record in records if record.error is None]
    of_pieces = sorted(latencies(good)["itl"])
    step = max(1, -(-len(of_pieces) // MOST_PIECES))
    return {
        "ttft": [round(record.ttft * MILLISECONDS, 3) for record in good],
        "tpot": [None if record.tpot is None else round(record.tpot * MILLISECONDS, 3) for record in good],
        "e2el": [round(record.e2el * MILLISECONDS, 3) for record in good],
        "itl": [round(value, 3) for value in of_pieces[::step]],
    }


def summarize(records: Sequence[RequestRecord], level: ServiceLevel | None = None) -> dict[str, Any]:
    """The figures of a run. Rates are over the time from the first request due to the last answer's end."""
    good = [record for record in records if record.error is None]
    begun = min((record.scheduled for record in records), default=0.0)
    duration = max((record.ended for record in records), default=0.0) - begun
    per_second = 1 / duration if duration > 0 else 0.0
    output_tokens = sum(record.output_tokens for record in good)
    prompt_tokens = sum(record.prompt_tokens or 0 for record in good)
    figures: dict[str, Any] = {
        "requests": len(records),
        "completed": len(good),
        "errors": dict(Counter(record.error for record in records if record.error is not None)),
        "duration_seconds": duration,
        "request_throughput": len(good) * per_second,
        "output_token_throughput": output_tokens * per_second,
        "total_token_throughput": (output_tokens + prompt_tokens) * per_second,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "cached_share": cached_share(good),
        "cached_share_of_later_turns": cached_share([record for record in good if record.turn > 0]),
        "max_concurrent_requests": max_concurrent(records),
        **{f"{name}_ms": summary(values) for name, values in latencies(records).items()},
    }
    if level is not None and level.limits:
        met = sum(level.is_met_by(record) for record in records)
        figures["goodput"] = {
            "limits_ms": dict(level.limits),
            "requests_per_second": met * per_second,
            "share": met / len(records) if records else 0.0,
        }
    return figures


def cached_share(records: Sequence[RequestRecord]) -> float | None:
    """The part of the prompts' tokens that was found in the prefix cache; None where no server said."""
    counted = [record for record in records if record.cached_tokens is not None and record.prompt_tokens]
    num_tokens = sum(record.prompt_tokens or 0 for record in counted)
    return sum(record.cached_tokens or 0 for record in counted) / num_tokens if num_tokens else None


def max_concurrent(records: Sequence[RequestRecord]) -> int:
    """Most requests that were under way at once."""
    changes = sorted([(record.sent, 1) for record in records] + [(record.ended, -1) for record in records])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
