"""When requests arrive in an open loop: a renewal process whose gaps have a gamma distribution."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from pagoda.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How load is put on a server.

    `request_rate`: conversations begun a second, in an open loop that waits for no answer; infinite: all at once, or as
    `max_concurrency` lets them, which is the closed loop. `burstiness`: shape of the gamma distribution of the gaps; 1 is
    a Poisson process, less comes in bursts, more is more even. `max_concurrency`: most conversations under way.
    """

    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.request_rate > 0:
            raise InvalidRequestError(f"--request-rate {self.request_rate} must be above 0, or inf")
        if not 0 < self.burstiness < math.inf:
            raise InvalidRequestError(f"--burstiness {self.burstiness} must be above 0 and finite")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise InvalidRequestError(f"--max-concurrency {self.max_concurrency} must be 1 or more")

    @property
    def is_open_loop(self) -> bool:
        """Whether arrivals are planned, and latencies count from the planned moment."""
        return math.isfinite(self.request_rate)

    def offsets(self, count: int) -> list[float]:
        """Seconds from the start at which each of `count` conversations arrives; the first at once."""
        if not self.is_open_loop:
            return [0.0] * count
        rng = random.Random(self.seed)
        scale = 1 / (self.request_rate * self.burstiness)
        offsets, now = [], 0.0
        for _ in range(count):
            offsets.append(now)
            now += rng.gammavariate(self.burstiness, scale)
        return offsets
