"""Requests that exceed `max_request_seconds`."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable

from pagoda.scheduling.request import Request

_SWEEP_FROM = 64  # ended requests that are not worth a sweep


class Deadlines:
    """The deadlines of all requests, the next one first. A request that ends before its deadline is removed soon after."""

    def __init__(self, max_seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_seconds`: time from arrival, of requests that are added from now on; None: there are no deadlines."""
        self.max_seconds = max_seconds
        self._clock = clock
        self._heap: list[tuple[float, int, Request]] = []
        self._sweep_at = _SWEEP_FROM

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: Request) -> None:
        """Watch a request that was accepted. Amortized O(log n)."""
        if self.max_seconds is None:
            return
        deadline = (request.spec.arrival_time or self._clock()) + self.max_seconds
        heapq.heappush(self._heap, (deadline, request.sequence_number, request))
        if len(self._heap) > self._sweep_at:
            # Otherwise one long request would keep all later, ended ones in memory.
            self._heap = [entry for entry in self._heap if not entry[2].is_finished]
            heapq.heapify(self._heap)
            self._sweep_at = _SWEEP_FROM + 2 * len(self._heap)

    def take_overdue(self) -> list[Request]:
        """Unfinished requests whose deadline has passed; each is returned once. O(1) when there are none."""
        overdue: list[Request] = []
        while self._heap and (self._heap[0][2].is_finished or self._heap[0][0] <= self._clock()):
            request = heapq.heappop(self._heap)[2]
            if not request.is_finished:
                overdue.append(request)
        return overdue
