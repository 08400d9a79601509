"""How fast the engine ends requests, for Retry-After."""

from __future__ import annotations

import math

_HALF_LIFE_SECONDS = 10.0
_LONGEST_SECONDS = 60


class ServiceRate:
    """Ended requests per busy second: both are exponentially decaying sums.

    Idle time is left out. Times are monotonic
    seconds.
    """

    def __init__(self) -> None:
        self._num_ended = 0.0
        self._seconds = 0.0
        self._last: float | None = None

    def resume(self, now: float) -> None:
        """There is work again after there was none."""
        self._last = now

    def count(self, now: float) -> None:
        elapsed = 0.0 if self._last is None else max(0.0, now - self._last)
        share = 0.5 ** (elapsed / _HALF_LIFE_SECONDS)
        self._num_ended = self._num_ended * share + 1.0
        self._seconds = self._seconds * share + (1.0 - share) * _HALF_LIFE_SECONDS / math.log(2)
        self._last = now

    def seconds_until_served(self, num_waiting: int) -> int:
        """Whole seconds until `num_waiting` requests will have been served, at least 1 and at most a minute."""
        if self._num_ended == 0.0:
            return 1
        return max(1, min(_LONGEST_SECONDS, math.ceil(num_waiting * self._seconds / self._num_ended)))
