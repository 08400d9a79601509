"""A scrape of `/metrics`, read: values, and histograms with their quantiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_MARK = "engine_state_transitions"
"""A family that every server of ours has: what stands before it is the prefix of all."""
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]`: values above `bounds[i - 1]` and at most `bounds[i]`, the last of which is infinite."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    sum: float

    @property
    def count(self) -> float:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """None without values."""
        return self.sum / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """The value below which `share` of the values are, linear within a bucket as Prometheus has it; None without values.

        Of values beyond the last finite bound, that bound.
        """
        if not self.count:
            return None
        rank, before, low = share * self.count, 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count and before + count >= rank:
                return low if math.isinf(bound) else low + (bound - low) * max(0.0, rank - before) / count
            before += count
            low = low if math.isinf(bound) else bound
        return low

    def share_below(self, limit: float) -> float | None:
        """The share of values of at most `limit`; None without values."""
        if not self.count:
            return None
        below, low = 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if limit >= bound:
                below += count
            elif limit > low and not math.isinf(bound):
                below += count * (limit - low) / (bound - low)
            low = bound
        return below / self.count

    def minus(self, earlier: Histogram | None) -> Histogram:
        """What was added since `earlier`; all of it where a server that started anew counts from 0 again."""
        if earlier is None or earlier.bounds != self.bounds or earlier.count > self.count:
            return self
        counts = tuple(now - then for now, then in zip(self.counts, earlier.counts, strict=True))
        return Histogram(self.bounds, counts, self.sum - earlier.sum)


class Samples:
    """The samples of a scrape under their names without the prefix (`pagoda_`, `vllm:`), which `prefix` keeps.

    Raises `ValueError` for a text that is no exposition of a Pagoda server.
    """

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        marks = [family.name for family in families if family.name.endswith(_MARK)]
        if not marks:
            raise ValueError("the metrics are not those of a Pagoda server")
        self.prefix = marks[0].removesuffix(_MARK)
        self._values: dict[str, dict[Labels, float]] = {}
        for family in families:
            for sample in family.samples:
                name = sample.name.removeprefix(self.prefix)
                self._values.setdefault(name, {})[tuple(sorted(sample.labels.items()))] = sample.value

    @property
    def models(self) -> list[str]:
        """Names of the served models."""
        return sorted({dict(labels).get("model_name", "") for labels in self._values.get("engine_state", {})})

    def value(self, name: str, **labels: str) -> float | None:
        """The sum of the series that have these labels; None where there is none."""
        found = [value for key, value in self._values.get(name, {}).items() if labels.items() <= dict(key).items()]
        return sum(found) if found else None

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """The same for each value of `label`."""
        found: dict[str, float] = {}
        for key, value in self._values.get(name, {}).items():
            own = dict(key)
            if label in own and labels.items() <= own.items():
                found[own[label]] = found.get(own[label], 0.0) + value
        return found

    def histogram(self, name: str, **labels: str) -> Histogram | None:
        """The histogram of that name, of several series their sum; None where there is none."""
        cumulative = sorted((float(bound), count) for bound, count in self.by(f"{name}_bucket", "le", **labels).items())
        if not cumulative:
            return None
        counts, before = [], 0.0
        for _, count in cumulative:
            counts.append(count - before)
            before = count
        return Histogram(
            tuple(bound for bound, _ in cumulative), tuple(counts), self.value(f"{name}_sum", **labels) or 0.0
        )


def rate(now: float | None, then: float | None, seconds: float) -> float | None:
    """How fast a counter has grown, a second; None where it is not known. A counter that began anew has grown by its value."""
    if now is None or seconds <= 0:
        return None
    return (now if then is None or then > now else now - then) / seconds


def differences(now: Samples, then: Samples, name: str, label: str) -> Mapping[str, float]:
    """By `label`, how much a counter has grown."""
    before = then.by(name, label)
    return {key: value - before.get(key, 0.0) for key, value in now.by(name, label).items()}
