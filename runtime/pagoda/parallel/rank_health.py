"""The health of a rank as last reported to the driver; the server exposes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RankHealth:
    """One rank as the driver sees it. `last_heartbeat`: `time.monotonic()` of the driver; it had done `num_steps` by then.

    `is_up`: false once its group has failed, which ends every rank.
    """

    rank: int
    host: str
    pid: int
    last_heartbeat: float
    num_steps: int
    is_up: bool = True
