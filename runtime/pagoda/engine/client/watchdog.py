"""When is a core stuck? Arithmetic on its last sign of life; nothing is asked of it.

A core writes to the progress board when a step is submitted and when it has landed, and about twice a second while it idles.
It writes nothing when a turn of its loop brought nothing, so one that spins in place looks as old as one that sleeps.

    idle       bound = timeout
    a step     the bound of its tokens, see `scheduling.step_timeout`

Silence is counted in looks at the board, each for the time since the one before and at most for `LONGEST_LOOK_SECONDS`. So a
server that was itself stopped, or starved of CPU, does not blame the core for the time in which nobody listened to it.
"""

from __future__ import annotations

from pagoda.engine.heartbeat import EngineProgress
from pagoda.scheduling.step_timeout import stall_bound

LONGEST_LOOK_SECONDS = 1.0


class StallWatch:
    """Watches one core. `timeout`: see `stall_bound`, in seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._last_sign: float | None = None
        self._last_look = 0.0
        self._silent = 0.0

    def look(self, progress: EngineProgress, now: float) -> str | None:
        """The sentence about a stuck core, or None for a healthy one. `now`: monotonic seconds."""
        if progress.time != self._last_sign:
            self._silent = 0.0
        else:
            self._silent += min(now - self._last_look, LONGEST_LOOK_SECONDS)
        self._last_sign, self._last_look = progress.time, now
        bound = stall_bound(progress.scheduled_tokens, self._timeout)
        if self._silent <= bound:
            return None
        doing = f"a step of {progress.scheduled_tokens} tokens" if progress.scheduled_tokens else "no step"
        return (
            f"the engine core gave no sign of life for {self._silent:.1f} s (bound {bound:.1f} s) "
            f"after step {progress.step}, in {doing}"
        )
