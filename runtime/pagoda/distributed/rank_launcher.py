"""How ranks come to be: what a launcher of processes and one of Ray actors have in common."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RankConnection:
    """A rank that was launched. `socket` is connected to it alone.

    `host`: its machine, for people and for counting the ranks of one. `route_to`: the driver's address as that machine reaches
    it, which decides on the network interface; None when all ranks run on the driver's machine. `device_index`: the rank's GPU
    among those that it sees.
    """

    socket: socket.socket
    host: str
    route_to: str | None
    device_index: int


class RankLauncher(Protocol):
    """Launches the ranks of one group, once. Called from one thread. `uses_ray`: whether ranks must agree on Ray's version."""

    uses_ray: bool

    def launch(
        self, num_ranks: int, timeout_seconds: float, on_progress: Callable[[str], None]
    ) -> list[RankConnection]:
        """Start all ranks, each of which then runs `RankService`; one connection a rank, in the order of ranks.

        Returns when all are connected. Raises a `PagodaError` after `timeout_seconds`, or when one cannot come at all: which,
        where, and what to do about it. Whatever was started until then is ended by `terminate`. `on_progress` is called
        with what is waited for, for people.
        """

    def death_of(self, rank: int) -> str | None:
        """How a rank ended (`was killed by SIGKILL`), or None while it runs or where that is not known."""

    def terminate(self, patience_seconds: float) -> None:
        """Wait until every rank has exited; kill after `patience_seconds`. `EndRank` was sent before. May be called twice."""
