"""Where requests wait: one interface, two orders. Every operation is O(1) (first come, first served) or O(log n) (priority).

Removing a request from the middle (an abort) only counts it out; its entry is skipped when it reaches the front, and all such
entries are swept out when they outnumber the living, so a client that sends and aborts cannot make the queue grow.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import deque

from pagoda.scheduling.request import Request, RequestStatus

_SWEEP_FROM = 64  # dead entries that are not worth a sweep


class WaitingQueue(ABC):
    """Requests that wait for admission, in the policy's order."""

    def __init__(self) -> None:
        self._length = 0
        self._num_dead = 0

    def __len__(self) -> int:
        return self._length

    def push(self, request: Request) -> None:
        """Add a request that has just arrived."""
        self._length += 1
        self._insert(request)

    def push_preempted(self, request: Request) -> None:
        """Add a request that had already been running; it goes before all that never ran."""
        self._length += 1
        self._insert_preempted(request)

    def peek(self) -> Request | None:
        """The request to admit next, or None."""
        while (request := self._first()) is not None and request.status is not RequestStatus.WAITING:
            self._drop_first()
            self._num_dead -= 1
        return request

    def pop(self) -> Request:
        """Take the request that `peek` showed."""
        request = self.peek()
        assert request is not None, "the waiting queue is empty"
        self._drop_first()
        self._length -= 1
        return request

    def discard(self) -> None:
        """Count out one request that was finished while it waited (its status is FINISHED by now)."""
        self._length -= 1
        self._num_dead += 1
        if self._num_dead > _SWEEP_FROM + self._length:
            self._sweep()
            self._num_dead = 0

    @abstractmethod
    def _insert(self, request: Request) -> None: ...

    @abstractmethod
    def _insert_preempted(self, request: Request) -> None: ...

    @abstractmethod
    def _first(self) -> Request | None: ...

    @abstractmethod
    def _drop_first(self) -> None: ...

    @abstractmethod
    def _sweep(self) -> None: ...


class FirstComeFirstServedQueue(WaitingQueue):
    """Order of arrival; preempted requests return to the front."""

    def __init__(self) -> None:
        super().__init__()
        self._requests: deque[Request] = deque()

    def _insert(self, request: Request) -> None:
        self._requests.append(request)

    def _insert_preempted(self, request: Request) -> None:
        self._requests.appendleft(request)

    def _first(self) -> Request | None:
        return self._requests[0] if self._requests else None

    def _drop_first(self) -> None:
        self._requests.popleft()

    def _sweep(self) -> None:
        self._requests = deque(r for r in self._requests if r.status is RequestStatus.WAITING)


class PriorityQueue(WaitingQueue):
    """Lower `priority` first; among equals the order of arrival, which a preempted request keeps."""

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[int, int, Request]] = []

    def _insert(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.priority, request.sequence_number, request))

    _insert_preempted = _insert

    def _first(self) -> Request | None:
        return self._heap[0][2] if self._heap else None

    def _drop_first(self) -> None:
        heapq.heappop(self._heap)

    def _sweep(self) -> None:
        self._heap = [entry for entry in self._heap if entry[2].status is RequestStatus.WAITING]
        heapq.heapify(self._heap)


def make_waiting_queue(policy: str) -> WaitingQueue:
    """The queue of a `scheduling_policy`: `fcfs` or `priority`."""
    return {"fcfs": FirstComeFirstServedQueue, "priority": PriorityQueue}[policy]()
