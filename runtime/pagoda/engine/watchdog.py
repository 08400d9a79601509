"""When is a core stuck? Arithmetic on its last sign of life; nothing is asked of it.

A core writes to the progress board when a step is submitted and when it has landed, and about twice a second while it idles.
It writes nothing when a turn of its loop brought nothing, so one that spins in place looks as old as one that sleeps.

    idle             bound = timeout
    a step of n      bound = timeout * max(1, n / TOKENS_PER_TIMEOUT)     an honest long prefill is given its time
"""

from __future__ import annotations

from pagoda.engine.progress_board import EngineProgress

TOKENS_PER_TIMEOUT = 512


def stall_bound(progress: EngineProgress, timeout: float) -> float:
    """Seconds that the core may be silent, `timeout` being those of an idle core or a small step."""
    return timeout * max(1.0, progress.scheduled_tokens / TOKENS_PER_TIMEOUT)


def describe_stall(progress: EngineProgress, now: float, timeout: float) -> str | None:
    """The sentence about a stuck core, or None for a healthy one. `now` is monotonic seconds."""
    silent = now - progress.time
    bound = stall_bound(progress, timeout)
    if silent <= bound:
        return None
    doing = f"a step of {progress.scheduled_tokens} tokens" if progress.scheduled_tokens else "no step"
    return (
        f"the engine core gave no sign of life for {silent:.1f} s (bound {bound:.1f} s) "
        f"after step {progress.step}, in {doing}"
    )
