"""Whether a core that failed is restarted, and after which backoff."""

from __future__ import annotations

from typing import Literal

FIRST_BACKOFF_SECONDS = 0.1
LONGEST_BACKOFF_SECONDS = 30.0
HEALTHY_SECONDS = 600.0
"""After so long without a failure the count of restarts starts over."""


class RestartPolicy:
    """`on_engine_failure` and `max_engine_restarts` as a decision; times are monotonic seconds."""

    def __init__(self, on_failure: Literal["restart", "exit"], max_restarts: int) -> None:
        self._max_restarts = max_restarts if on_failure == "restart" else 0
        self._started_at = 0.0
        self._num_useless = 0  # cores in a row that failed before they had an output for anybody
        self.has_served = False
        self.num_failures = 0

    def core_started(self, now: float) -> None:
        """A core was started."""
        self._started_at = now
        self.has_served = False

    def backoff(self, now: float) -> float | None:
        """The core has failed: seconds until the restart, or None for no restart."""
        if now - self._started_at > HEALTHY_SECONDS:
            self.num_failures = self._num_useless = 0
        if self.has_served:
            self._num_useless = 0
        self.num_failures += 1
        if self.num_failures > self._max_restarts:
            return None
        self._num_useless += 1
        return float(min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 4 ** (self._num_useless - 1)))

    @property
    def attempt(self) -> str:
        """The number of this restart, for the log."""
        return f"attempt {self.num_failures} of {self._max_restarts}"
