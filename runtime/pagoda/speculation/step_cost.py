"""What a step costs by its number of tokens, measured while serving.

Only ratios matter: whether 9 tokens take so much longer than 1 that 8 drafts do not pay. Contexts grow and neighbours come and
go, which changes all steps alike; this is followed by one factor, and the ratios by the rest of each measurement.
"""

from __future__ import annotations

from bisect import bisect_left

# Token counts with an entry of their own: all up to 32, then eight an octave.
_SIZES: list[int] = [
    *range(1, 33),
    *(
        size
        for base in (32, 64, 128, 256, 512, 1024, 2048)
        for size in range(base + base // 8, 2 * base + 1, base // 8)
    ),
]
# Before anything is measured, a further token costs this share of a step with one. Rather much: on a CPU with compiled kernels
# it is a tenth, on a GPU far less.
_PRIOR_SLOPE = 0.1
_SMALLEST_SHARE = 0.03  # of a new measurement
_DRIFT_SHARE = 0.25
_OUTLIER = 2.0  # times more, or less, than expected


class StepCost:
    """Seconds of a step of T tokens all of whose rows sample, up to a common factor."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._measured: list[int] = []  # the keys of both, sorted
        self._drift = 1.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take a measurement."""
        size = _size_of(num_tokens)
        count = self._counts[size] = self._counts.get(size, 0) + 1
        if count == 1:
            self._measured.insert(bisect_left(self._measured, size), size)
            self._seconds[size] = seconds / self._drift
            return
        expected = self._seconds[size]
        ratio = min(max(seconds / (self._drift * expected), 1 / _OUTLIER), _OUTLIER)
        found = expected * ratio * self._drift
        self._drift *= 1.0 + _DRIFT_SHARE * (ratio - 1.0)
        self._seconds[size] += max(_SMALLEST_SHARE, 1 / count) * (found / self._drift - expected)

    def is_measured(self, num_tokens: int) -> bool:
        """Whether there was a step of about so many tokens."""
        return _size_of(num_tokens) in self._seconds

    def of(self, num_tokens: int) -> float:
        """The cost of a step of so many tokens: between two measured ones interpolated, beyond them along the line from the
        first to the last; with one alone, by the prior."""
        measured = self._measured
        if not measured:
            return _prior(num_tokens)
        right = bisect_left(measured, num_tokens)
        if right == len(measured):
            first, last = measured[0], measured[-1]
            if first == last:
                return self._seconds[last] * _prior(num_tokens) / _prior(last)
            slope = max(0.0, self._seconds[last] - self._seconds[first]) / (last - first)
            return self._seconds[last] + slope * (num_tokens - last)
        high = measured[right]
        if right == 0:
            return self._seconds[high] * _prior(num_tokens) / _prior(high)
        low = measured[right - 1]
        part = (num_tokens - low) / (high - low)
        return self._seconds[low] + part * (self._seconds[high] - self._seconds[low])

    def seconds(self, num_tokens: int) -> float:
        """The same in seconds as of now; 0 before anything is measured."""
        return self.of(num_tokens) * self._drift if self._measured else 0.0


def _prior(num_tokens: int) -> float:
    return 1.0 + _PRIOR_SLOPE * (num_tokens - 1)


def _size_of(num_tokens: int) -> int:
    size: int = _SIZES[min(bisect_left(_SIZES, num_tokens), len(_SIZES) - 1)]
    return size
