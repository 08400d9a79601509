"""The waiting queue: the requests of each flow in an order of their own, under one of two policies.

Whose request is next is not decided here but by `TenantShares`. Every operation is O(1) (first come, first served) or O(log n)
(priority). Removing a request from the middle (an abort) only decreases the count; its entry is skipped when it reaches the
front, and such stale entries are removed together when they outnumber the others, so aborts cannot make the queue grow.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection

from typing_extensions import override

from pagoda.scheduling.request import Flow, Request, RequestStatus

DUE_SECONDS = 60.0
"""From its arrival a request without a `ttft_slo` is due so late: those with one go before it no longer than that."""
_SWEEP_FROM = 64  # stale entries that are not worth a sweep


class FlowQueue(ABC):
    """The waiting requests of one flow, in the policy's order."""

    def __init__(self) -> None:
        self.length = 0
        self._num_stale = 0

    def push(self, request: Request) -> None:
        """Add a request that has just arrived."""
        self.length += 1
        self._insert(request)

    def push_preempted(self, request: Request) -> None:
        """Add a request that had already been running."""
        self.length += 1
        self._insert_preempted(request)

    def peek(self) -> Request:
        """The request to admit next; there is one."""
        while (request := self._first()).status is not RequestStatus.WAITING:
            self._drop_first()
            self._num_stale -= 1
        return request

    def pop(self) -> Request:
        """Take the request that `peek` shows."""
        request = self.peek()
        self._drop_first()
        self.length -= 1
        return request

    def discard(self) -> None:
        """Count out a request that was finished while it waited; it is not WAITING any more."""
        self.length -= 1
        self._num_stale += 1
        if self._num_stale > _SWEEP_FROM + self.length:
            self._sweep()
            self._num_stale = 0

    @abstractmethod
    def _insert(self, request: Request) -> None: ...

    @abstractmethod
    def _insert_preempted(self, request: Request) -> None: ...

    @abstractmethod
    def _first(self) -> Request: ...

    @abstractmethod
    def _drop_first(self) -> None: ...

    @abstractmethod
    def _sweep(self) -> None: ...


class FirstComeFirstServed(FlowQueue):
    """Order of arrival; preempted requests come before all that never ran."""

    def __init__(self) -> None:
        super().__init__()
        self._entries: deque[Request] = deque()

    @override
    def _insert(self, request: Request) -> None:
        self._entries.append(request)

    @override
    def _insert_preempted(self, request: Request) -> None:
        self._entries.appendleft(request)

    @override
    def _first(self) -> Request:
        return self._entries[0]

    @override
    def _drop_first(self) -> None:
        self._entries.popleft()

    @override
    def _sweep(self) -> None:
        self._entries = deque(entry for entry in self._entries if entry.status is RequestStatus.WAITING)


class ByPriority(FlowQueue):
    """Lower `priority` first; among equals the one whose first token is due first, and then the order of arrival, which a
    preempted request keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[int, float, int, Request]] = []

    @override
    def _insert(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.spec.priority, _due(request), request.sequence_number, request))

    _insert_preempted = _insert

    @override
    def _first(self) -> Request:
        return self._heap[0][3]

    @override
    def _drop_first(self) -> None:
        heapq.heappop(self._heap)

    @override
    def _sweep(self) -> None:
        self._heap = [entry for entry in self._heap if entry[3].status is RequestStatus.WAITING]
        heapq.heapify(self._heap)


def _due(request: Request) -> float:
    slo = request.spec.ttft_slo
    return request.spec.arrival_time + (DUE_SECONDS if slo is None else slo)


_POLICIES: dict[str, type[FlowQueue]] = {"fcfs": FirstComeFirstServed, "priority": ByPriority}


class WaitingQueue:
    """The queues of all flows that have waiting requests. `policy`: `fcfs` or `priority`."""

    def __init__(self, policy: str) -> None:
        self._new_queue = _POLICIES[policy]
        self._queues: dict[Flow, FlowQueue] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def flows(self) -> Collection[Flow]:
        """The flows with waiting requests."""
        return self._queues.keys()

    def num_of(self, flow: Flow) -> int:
        """How many requests of `flow` wait."""
        queue = self._queues.get(flow)
        return 0 if queue is None else queue.length

    def push(self, request: Request) -> None:
        """Add a request that has just arrived."""
        self._length += 1
        self._queue_of(request).push(request)

    def push_preempted(self, request: Request) -> None:
        """Add a request that had already been running."""
        self._length += 1
        self._queue_of(request).push_preempted(request)

    def peek(self, flow: Flow) -> Request:
        """The request of `flow`, which is one of `flows`, to admit next."""
        return self._queues[flow].peek()

    def pop(self, flow: Flow) -> Request:
        """Take the request that `peek` shows."""
        request = self._queues[flow].pop()
        self._count_out(flow)
        return request

    def discard(self, request: Request) -> None:
        """Count out a request that was finished while it waited (its status is FINISHED by now)."""
        self._queues[request.flow].discard()
        self._count_out(request.flow)

    def _queue_of(self, request: Request) -> FlowQueue:
        queue = self._queues.get(request.flow)
        if queue is None:
            queue = self._queues[request.flow] = self._new_queue()
        return queue

    def _count_out(self, flow: Flow) -> None:
        self._length -= 1
        if not self._queues[flow].length:
            del self._queues[flow]
