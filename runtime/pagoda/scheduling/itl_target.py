"""How long a step may be aimed at so that 99 of 100 take no longer than a target.

Steps take sometimes longer than what was learned of them says. So the aim is below the target, by a quantile that is tracked
(Robbins and Monro, 1951): a step beyond the target lowers the aim by 99 parts, any other one raises it by one, which are in
balance where one step of a hundred is beyond it.
"""

from __future__ import annotations

from math import exp

_PART = 0.004  # of the aim's logarithm
_LOWEST = -0.7  # half of the target: what is slower than that has other reasons


class ItlTarget:
    """`seconds`: between two tokens of a request, at most in 99 of 100 steps that prompts are added to."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._log_share = 0.0

    @property
    def aim(self) -> float:
        """Seconds that a step is to take."""
        return self.seconds * exp(self._log_share)

    def observe(self, seconds: float) -> None:
        """A step took so long."""
        change = -99 * _PART if seconds > self.seconds else _PART
        self._log_share = min(0.0, max(_LOWEST, self._log_share + change))
