"""Steps without drafts among those with: what drafts gain is known as well as what a step takes that has none."""

from __future__ import annotations

from pagoda.scheduling.step_cost import StepCost

_PER_MEASUREMENT, _MOST_BETWEEN = 2, 40


class PlainSteps:
    """Says which steps are to have no drafts: many where few were measured, later one of `_MOST_BETWEEN`."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._num_since = 0

    def is_due(self, num_outputs: int) -> bool:
        """Of a step of so many outputs that could have drafts."""
        self._num_since += 1
        if self._num_since <= min(_PER_MEASUREMENT * self._cost.num_measured(num_outputs), _MOST_BETWEEN):
            return False
        self._num_since = 0
        return True
