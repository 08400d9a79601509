"""How often drafts are right, by their place in a row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

_FIRST_GUESS = 0.7


class AcceptanceRates:
    """`rates[j]`: how often draft j was right where those before it were; new observations count for `share`."""

    def __init__(self, rates: Sequence[float], share: float) -> None:
        self.rates = list(rates)
        self._share = share

    @classmethod
    def unknown(cls, num_drafts: int, share: float) -> AcceptanceRates:
        """Before any draft was verified."""
        return cls([_FIRST_GUESS] * num_drafts, share)

    def observe(self, num_drafts: int, num_right: int) -> None:
        """Of `num_drafts` in a row the first `num_right` were right, and the next one, if there was one, was not."""
        rates, share = self.rates, self._share
        for place in range(min(num_right, len(rates))):
            rates[place] += share * (1.0 - rates[place])
        if num_right < min(num_drafts, len(rates)):
            rates[num_right] -= share * rates[num_right]

    def all_right_up_to(self, num_drafts: int) -> list[float]:
        """Of each of so many drafts how likely it and all before it are right."""
        return list(accumulate(self.rates[:num_drafts], mul))
