"""How many tokens a step may have: the configured number, or less for a while after a step did not fit the device."""

from __future__ import annotations

_REGROW_STEPS = 64  # good steps before a budget that was halved is doubled again


class TokenBudget:
    """Halved by a step that did not fit, doubled again after many that did. At least 1, at most what was configured."""

    def __init__(self, configured: int) -> None:
        self.tokens = configured
        self._configured = configured
        self._good_steps = 0

    @property
    def shortage(self) -> str:
        """How far the budget is below what was configured, in words; empty when it is not."""
        if self.tokens == self._configured:
            return ""
        return f"steps have {self.tokens} tokens of {self._configured} at most since one did not fit the device"

    def shrink(self) -> bool:
        """Halve the budget; False when it cannot be any smaller."""
        if self.tokens == 1:
            return False
        self.tokens //= 2
        self._good_steps = 0
        return True

    def count_good_step(self) -> None:
        """A step fitted."""
        self._good_steps += 1
        if self.tokens < self._configured and self._good_steps >= _REGROW_STEPS:
            self.tokens = min(self._configured, 2 * self.tokens)
            self._good_steps = 0
