"""How often drafts are right, by their place in a row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

_FIRST_GUESS = 0.7


class AcceptanceRates:
    """`rates[j]`: how often draft j was right where those before it were. Places that no draft came to are like the one before
    them."""

    def __init__(self, rates: Sequence[float], share: float, num_believed: int = 1, num_tried: int = 0) -> None:
        """`rates` are believed as if each were seen `num_believed` times, of the first `num_tried` places; with more
        observations than 1 / `share` each new one counts for `share`."""
        self.rates = list(rates)
        self.num_tried = num_tried
        self._share = share
        self._num_seen = [num_believed] * len(self.rates)

    @classmethod
    def unknown(cls, num_drafts: int, share: float, num_believed: int = 1) -> AcceptanceRates:
        """Before any draft was verified."""
        return cls([_FIRST_GUESS] * num_drafts, share, num_believed)

    def copy(self, share: float, num_believed: int) -> AcceptanceRates:
        """What another one begins with."""
        return AcceptanceRates(self.rates, share, num_believed, self.num_tried)

    def observe(self, num_drafts: int, num_right: int, least_share: float = 0.0) -> None:
        """Of `num_drafts` in a row the first `num_right` were right, and the next one, if there was one, was not.

        `least_share`: what this counts for at least; for observations that are rare.
        """
        rates = self.rates
        num_told = min(num_right + 1, num_drafts, len(rates))
        for place in range(num_told):
            self._num_seen[place] += 1
            share = max(self._share, least_share, 1.0 / self._num_seen[place])
            rates[place] += share * ((1.0 if place < num_right else 0.0) - rates[place])
        known = self.num_tried = max(self.num_tried, num_told)
        if 0 < known < len(rates):
            rates[known:] = [rates[known - 1]] * (len(rates) - known)

    def all_right_up_to(self, num_drafts: int) -> list[float]:
        """Of each of so many drafts how likely it and all before it are right."""
        return list(accumulate(self.rates[:num_drafts], mul))
