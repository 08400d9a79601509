"""What a step costs by its number of tokens, measured while serving: it says how long prompts and tenants may make a step, and
how many drafts pay.

Only ratios matter: whether 9 tokens take so much longer than 1 that 8 drafts do not pay. Contexts grow and neighbours come and
go, which changes all steps alike; this is followed by one factor, the pace, and the ratios by the rest of each measurement.

    log seconds = log pace + log cost of the size + noise

Both follow the same bounded error, so that noise of any distribution moves neither on the average. (Were one of them a mean
and the other one a median, they would part: what is not measured for a while would seem ever dearer.)
"""

from __future__ import annotations

from bisect import bisect_left
from math import exp, log

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
_NUM_FIRST = 5  # measurements of a size of which the median counts
_SMALLEST_SHARE = 0.03  # of a new measurement
_PACE_SHARE = 0.25
_LARGEST_ERROR = log(2.0)
_SHORTEST = 1e-9  # seconds: a clock may stand still


class Pace:
    """How long everything takes at present, as a multiple of what it took at first."""

    def __init__(self) -> None:
        self.factor = 1.0


class StepCost:
    """Seconds of a step of T tokens all of whose rows sample, up to the pace."""

    def __init__(self, pace: Pace | None = None) -> None:
        """`pace`: that of other work of the same device, which it then shares."""
        self.pace = pace or Pace()
        self._cost: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._first: dict[int, list[float]] = {}  # measurements of sizes that have few
        self._measured: list[int] = []  # the keys, sorted

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take a measurement."""
        size, pace = _size_of(num_tokens), self.pace
        seconds = max(seconds, _SHORTEST)
        count = self._counts[size] = self._counts.get(size, 0) + 1
        error = 0.0
        if count == 1:
            self._measured.insert(bisect_left(self._measured, size), size)
        else:
            error = log(seconds / (pace.factor * self._cost[size]))
            error = min(max(error, -_LARGEST_ERROR), _LARGEST_ERROR)
            pace.factor *= exp(_PACE_SHARE * error)
        if count <= _NUM_FIRST:
            first = self._first.setdefault(size, [])
            first.append(seconds / pace.factor)
            self._cost[size] = sorted(first)[(count - 1) // 2]
        else:
            self._first.pop(size, None)
            self._cost[size] *= exp(max(_SMALLEST_SHARE, 1 / count) * (1.0 - _PACE_SHARE) * error)

    def is_measured(self, num_tokens: int) -> bool:
        """Whether there was a step of about so many tokens."""
        return _size_of(num_tokens) in self._cost

    def num_measured(self, num_tokens: int) -> int:
        """How many steps of about so many tokens there were."""
        return self._counts.get(_size_of(num_tokens), 0)

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
                return self._cost[last] * _prior(num_tokens) / _prior(last)
            slope = max(0.0, self._cost[last] - self._cost[first]) / (last - first)
            return self._cost[last] + slope * (num_tokens - last)
        high = measured[right]
        if right == 0:
            return self._cost[high] * _prior(num_tokens) / _prior(high)
        low = measured[right - 1]
        part = (num_tokens - low) / (high - low)
        return self._cost[low] + part * (self._cost[high] - self._cost[low])

    def seconds(self, num_tokens: int) -> float:
        """The same in seconds as of now; 0 before anything is measured."""
        return self.of(num_tokens) * self.pace.factor if self._measured else 0.0


def _prior(num_tokens: int) -> float:
    return 1.0 + _PRIOR_SLOPE * (num_tokens - 1)


def _size_of(num_tokens: int) -> int:
    size: int = _SIZES[min(bisect_left(_SIZES, num_tokens), len(_SIZES) - 1)]
    return size
