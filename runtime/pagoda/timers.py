"""Timeouts that do not count the time in which this process was itself suspended, or starved of CPU.

A clock runs on while a process is stopped; whatever it then finds overdue may only have waited for this process. So time is
counted from check to check, and at most `LONGEST_CHECK_SECONDS` of it: the caller checks more often than that.
"""

from __future__ import annotations

LONGEST_CHECK_SECONDS = 1.0


class SuspendSafeTimer:
    """Seconds in which this process was running. `now`: monotonic seconds, in all methods."""

    def __init__(self, now: float) -> None:
        self.seconds = 0.0
        self._last_check = now

    def check(self, now: float) -> float:
        """Seconds up to `now`."""
        self.seconds += min(now - self._last_check, LONGEST_CHECK_SECONDS)
        self._last_check = now
        return self.seconds


class HeartbeatTimer:
    """Seconds without a heartbeat, as `SuspendSafeTimer` counts them."""

    def __init__(self) -> None:
        self._last_heartbeat: float | None = None
        self._timer = SuspendSafeTimer(0.0)

    def check(self, last_heartbeat: float, now: float) -> float:
        """Seconds up to `now`; a `last_heartbeat` (its time) other than at the check before starts over."""
        if last_heartbeat != self._last_heartbeat:
            self._last_heartbeat = last_heartbeat
            self._timer = SuspendSafeTimer(now)
        return self._timer.check(now)
