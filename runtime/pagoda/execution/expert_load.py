"""How evenly tokens were spread over the experts of a mixture, measured now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from pagoda.scheduling.plan import ExpertLoad

INTERVAL_SECONDS = 10.0


class ExpertLoadMeter:
    """Reads the counters of all mixtures of a rank, which count every row that chose an expert, every ten seconds.

    The device is not waited for: what is reported was asked for one interval before. `counters`: int64 [experts], one a
    layer. `num_ranks`: that have some of the experts each; 1 where none are shared out.
    """

    def __init__(
        self, counters: Sequence[torch.Tensor], num_ranks: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._counters = counters
        self._num_ranks = num_ranks
        self._clock = clock
        self._next_at = clock() + INTERVAL_SECONDS
        self._before = torch.zeros((len(counters), len(counters[0])), dtype=torch.int64)
        self._asked: torch.Tensor | None = None

    def take(self) -> ExpertLoad | None:
        """The load of an interval that has ended and was not taken yet; costs nothing while there is none."""
        if self._clock() < self._next_at:
            return None
        self._next_at = self._clock() + INTERVAL_SECONDS
        asked, self._asked = self._asked, self._ask()
        if asked is None:
            return None
        counts, self._before = asked - self._before, asked
        return measured(counts.double(), self._num_ranks)

    def _ask(self) -> torch.Tensor:
        counts = torch.stack(list(self._counters))
        if counts.device.type == "cpu":
            return counts
        return counts.to("cpu", non_blocking=True)


def measured(counts: torch.Tensor, num_ranks: int) -> ExpertLoad | None:
    """The figures of rows by layer and expert, [layers, experts]; None where there were none."""
    if not bool(counts.sum()):
        return None
    of_experts = counts.amax(dim=1) / counts.mean(dim=1)
    each = -(-counts.shape[1] // num_ranks)
    by_rank = torch.stack([part.sum(dim=1) for part in torch.split(counts, each, dim=1)], dim=1)
    of_ranks = by_rank.amax(dim=1) / (counts.sum(dim=1) / num_ranks)
    return ExpertLoad(
        imbalance=float(of_experts.mean()),
        worst_imbalance=float(of_experts.max()),
        idle_share=float((counts == 0).double().mean()),
        rank_imbalance=float(of_ranks.mean()),
    )
