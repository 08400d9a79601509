"""How long a step may take before something must be wrong: a bound that grows with its tokens.

a step of n      bound = timeout * max(1, n / TOKENS_PER_TIMEOUT)      an honest long prefill is given its time
several steps    the same, each of them counted with at least TOKENS_OF_A_STEP tokens (`num_scheduler_steps`)
"""

from __future__ import annotations

from pagoda.scheduling.plan import StepPlan

TOKENS_PER_TIMEOUT = 512
TOKENS_OF_A_STEP = 32


def tokens_to_wait_for(plan: StepPlan) -> int:
    """The tokens of a plan as the bound counts them."""
    return max(plan.total_tokens, TOKENS_OF_A_STEP * max(plan.num_steps, default=0))


def stall_bound(scheduled_tokens: int, timeout: float) -> float:
    """Seconds that may pass, `timeout` being those of an idle engine or a small step."""
    return timeout * max(1.0, scheduled_tokens / TOKENS_PER_TIMEOUT)
