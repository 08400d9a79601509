"""Rounds of one run each, one engine after the other, and what follows from them. See benchmarks/NOTES.md for why."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.process import WorkerFailedError

Run = Callable[[str, int], dict[str, Any]]
"""Runs one engine in one round and gives its figures; raises `WorkerFailedError`."""

WARM_UP_ROUND = -1


@dataclass(slots=True)
class Rounds:
    """`figures[engine][round]`; `failures` and `slow` say why an engine has none, or only its warm-up."""

    figures: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    slow: dict[str, dict[str, Any]] = field(default_factory=dict)

    def values(self, engine: str, name: str) -> list[float]:
        """One figure of every round."""
        return [figures[name] for figures in self.figures.get(engine, ())]

    def median(self, engine: str, name: str) -> float | None:
        """The median over rounds; of the warm-up for an engine that was too slow to go on."""
        values = self.values(engine, name)
        if values:
            return statistics.median(values)
        return self.slow[engine][name] if engine in self.slow else None


def run_rounds(
    engines: Sequence[str],
    run: Run,
    num_rounds: int,
    *,
    figure: str,
    higher_is_better: bool = True,
    slowest: float = float("inf"),
    keep: Collection[str] = (),
) -> Rounds:
    """A warm-up of every engine, then `num_rounds` rounds in which each runs once; each round begins with the next engine.

    An engine whose warm-up is more than `slowest` times worse than the best one's is left out of the rounds, but for those in
    `keep`. One that fails is left out from then on.
    """
    rounds = Rounds()
    warm: dict[str, dict[str, Any]] = {}
    for engine in engines:
        _try(engine, WARM_UP_ROUND, run, rounds, lambda figures, engine=engine: warm.__setitem__(engine, figures))
    scores = {name: values[figure] if higher_is_better else 1 / values[figure] for name, values in warm.items()}
    best = max(scores.values(), default=0.0)
    rounds.slow = {name: warm[name] for name, score in scores.items() if name not in keep and score * slowest < best}
    running = [name for name in warm if name not in rounds.slow]
    for number in range(num_rounds):
        shift = number % max(1, len(running))
        for engine in running[shift:] + running[:shift]:
            if engine not in rounds.failures:
                _try(engine, number, run, rounds, rounds.figures.setdefault(engine, []).append)
    for engine in rounds.failures:
        rounds.figures.pop(engine, None)
    return rounds


def _try(engine: str, number: int, run: Run, rounds: Rounds, keep: Callable[[dict[str, Any]], object]) -> None:
    try:
        keep(run(engine, number))
    except WorkerFailedError as error:
        rounds.failures[engine] = str(error)


def median_ratio(own: Sequence[float], other: Sequence[float], *, higher_is_better: bool) -> float | None:
    """How many times better `own` is: the median of the ratios within each round. None where a side has no rounds."""
    if not own or len(own) != len(other):
        return None
    ratios = [mine / theirs for mine, theirs in zip(own, other, strict=True)]
    ratio = statistics.median(ratios)
    return ratio if higher_is_better else 1 / ratio
