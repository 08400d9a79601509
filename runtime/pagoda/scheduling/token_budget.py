"""The token budget of a step: the configured number, or less for a while after a step ran out of device memory (OOM)."""

from __future__ import annotations

_REGROW_STEPS = 64  # good steps before a budget that was halved is doubled again


class TokenBudget:
    """Halved after OOM, doubled again after `_REGROW_STEPS` steps without. At least 1, at most what was configured."""

    def __init__(self, configured: int) -> None:
        self.tokens = configured
        self._configured = configured
        self._good_steps = 0

    def configure(self, configured: int) -> None:
        """Another full budget from the next step on."""
        self._configured = configured
        self.tokens = configured
        self._good_steps = 0

    @property
    def shortage(self) -> str:
        """A description of the reduced budget; empty at the full budget."""
        if self.tokens == self._configured:
            return ""
        return f"out of memory in a step: the token budget is {self.tokens} of {self._configured} tokens"

    def shrink(self) -> bool:
        """Halve the budget; False when it cannot be any smaller."""
        if self.tokens == 1:
            return False
        self.tokens //= 2
        self._good_steps = 0
        return True

    def count_good_step(self) -> None:
        """Count a step that had enough memory; may double the budget."""
        self._good_steps += 1
        if self.tokens < self._configured and self._good_steps >= _REGROW_STEPS:
            self.tokens = min(self._configured, 2 * self.tokens)
            self._good_steps = 0
