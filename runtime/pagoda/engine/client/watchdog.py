"""The watchdog: detects a stuck engine core by the age of its last heartbeat.

A core writes its heartbeat when a step is submitted and when its result is there, and about twice a second while it idles. It
writes none in an iteration of its loop without progress, so a core that spins times out as well.

    idle       bound = timeout
    a step     the bound of its tokens, see `scheduling.step_timeout`
"""

from __future__ import annotations

from pagoda.engine.heartbeat import EngineHeartbeat
from pagoda.scheduling.step_timeout import stall_bound
from pagoda.timers import HeartbeatTimer


class Watchdog:
    """The watchdog of one core. `timeout`: see `stall_bound`, in seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._timer = HeartbeatTimer()

    def check(self, heartbeat: EngineHeartbeat, now: float) -> str | None:
        """The error for a stuck core, or None for a healthy one. `now`: monotonic seconds."""
        silent = self._timer.check(heartbeat.time, now)
        bound = stall_bound(heartbeat.scheduled_tokens, self._timeout)
        if silent <= bound:
            return None
        doing = f"a step of {heartbeat.scheduled_tokens} tokens" if heartbeat.scheduled_tokens else "no step"
        return (
            f"no heartbeat of the engine core for {silent:.1f} s (timeout {bound:.1f} s) after step {heartbeat.step}, "
            f"in {doing}"
        )
