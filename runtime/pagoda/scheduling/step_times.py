"""How much more a step may compute beside some rows, learned from the steps that ran.

    seconds of a step with `base` rows alone      `StepCost`
    seconds a token that is added to them         a moving average over all sizes

The first is measured when such a step happens to run, or else is made to: `extra_tokens` is 0 at first, and every
`_MEASURE_EVERY` calls.
So the estimate follows the machine, the model and the lengths of contexts without knowing any of them.
"""

from __future__ import annotations

from math import log2

from pagoda.scheduling.step_cost import StepCost

_SIZES_PER_OCTAVE = 4  # those that are measured
_MEASURE_EVERY = 64  # calls for a size, at most, between two steps of its rows alone
_MEASURE_GAP = 8  # calls, at least, before a size is measured again after any was
_WEIGHT = 0.25  # of a new value in a moving average
_LARGEST_RATIO = 4.0  # of a new value and the average: one step that was held up says little about the next


class StepTimes:
    """`first_guess`: tokens that may be added to a step while nothing is known."""

    def __init__(self, first_guess: int) -> None:
        self._first_guess = max(1, first_guess)
        self._cost = StepCost()
        self._smallest: float | None = None  # of the measured steps' seconds a token
        self._measure_at: dict[int, int] = {}  # by size: the call that is to be answered with 0
        self._seconds_per_token: float | None = None
        self._num_calls = 0
        self._last_measured = 0
        self._largest_known = float(self._first_guess)  # tokens that were added to a step lately

    def extra_tokens(
        self, num_base: int, share: float, *, most_seconds: float | None = None, may_measure: bool = True
    ) -> int:
        """How many tokens to add to a step of `num_base` so that it takes `1 + share` times as long.

        `most_seconds`: instead as many as make it take so long, and as `share` says where that is more.
        0 only with `may_measure`: the step is to run as it is, so that its time is known.
        """
        self._num_calls += 1
        size = _size(num_base)
        measure_at = self._measure_at.get(size)
        is_due = measure_at is None or (self._num_calls >= max(measure_at, self._last_measured + _MEASURE_GAP))
        if may_measure and is_due:
            self._last_measured = self._num_calls
            self._measure_at[size] = self._num_calls + _MEASURE_EVERY
            return 0
        seconds = self._cost.seconds(num_base)
        # It is not more than all of a step's time divided by its tokens.
        per_token = self._seconds_per_token or self._smallest
        if not self._cost.is_measured(num_base) or per_token is None:
            return self._first_guess
        added = share * seconds if most_seconds is None else max(share * seconds, most_seconds - seconds)
        # Beyond twice of what was seen the time need not grow as it did up to there.
        return max(1, int(min(added / per_token, 2 * self._largest_known)))

    def note(self, num_tokens: int, num_base: int, seconds: float, *, is_pure: bool) -> None:
        """A step of `num_tokens` took so long, `num_base` of which were there before any were added.

        `is_pure`: it says how long that many tokens take by themselves: none of a prompt were added to rows that decode.
        """
        if seconds <= 0:
            return  # shorter than the clock can tell
        num_added = num_tokens - num_base
        if num_added and self._cost.is_measured(num_base):
            base = self._cost.seconds(num_base)
            # Noise may make the step look shorter than its base: each token costs something.
            per_token = max(seconds - base, 0.02 * seconds) / num_added
            self._seconds_per_token = _moved(self._seconds_per_token, per_token)
            self._largest_known = max(num_added, 0.99 * self._largest_known, self._first_guess)
        if is_pure:
            self._cost.observe(num_tokens, seconds)
            self._smallest = min(self._smallest or seconds, seconds / num_tokens)
            self._measure_at[_size(num_tokens)] = self._num_calls + _MEASURE_EVERY


def _size(num_tokens: int) -> int:
    return int(_SIZES_PER_OCTAVE * log2(max(1, num_tokens)))


def _moved(average: float | None, value: float) -> float:
    if average is None:
        return value
    return average + _WEIGHT * (min(value, _LARGEST_RATIO * average) - average)
