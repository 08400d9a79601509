"""How fast the engine ends requests, for an honest Retry-After."""

from __future__ import annotations

import math

_HALF_LIFE_SECONDS = 10.0
_LONGEST_SECONDS = 60


class ServiceRate:
    """Exponentially weighted rate of ended requests; times are the engine's monotonic seconds."""

    def __init__(self) -> None:
        self._per_second = 0.0
        self._last: float | None = None

    def count(self, now: float) -> None:
        """One request ended at `now`."""
        if self._last is not None:
            # Ended requests come in bursts, one step's at one time: each adds its weight, time takes weight away.
            self._per_second *= 0.5 ** (max(0.0, now - self._last) / _HALF_LIFE_SECONDS)
        self._per_second += math.log(2) / _HALF_LIFE_SECONDS
        self._last = now

    def seconds_until_served(self, num_waiting: int) -> int:
        """Whole seconds until `num_waiting` requests will have been served, at least 1 and at most a minute."""
        if self._per_second == 0.0:
            return 1
        return max(1, min(_LONGEST_SECONDS, math.ceil(num_waiting / self._per_second)))
