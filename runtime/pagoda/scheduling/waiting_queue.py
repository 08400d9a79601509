"""Where requests wait: one interface, two orders. Every operation is O(1) (first come, first served) or O(log n) (priority).

Removing a request from the middle (an abort) only counts it out; its entry is skipped when it reaches the front, and all such
entries are swept out when they outnumber the living, so a client that sends and aborts cannot make the queue grow.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from pagoda.scheduling.request import Request, RequestStatus

_SWEEP_FROM = 64  # dead entries that are not worth a sweep


class WaitingQueue(ABC):
    """Requests that wait for admission, in the policy's order."""

    def __init__(self) -> None:
        self._length = 0
        self._num_of: Counter[str] = Counter()  # waiting requests of each tenant that has any
        self._num_dead = 0

    def __len__(self) -> int:
        return self._length

    def num_of(self, tenant: str) -> int:
        """How many requests of `tenant` wait."""
        return self._num_of[tenant]

    def push(self, request: Request) -> None:
        """Add a request that has just arrived."""
        self._count_in(request)
        self._insert(request)

    def push_preempted(self, request: Request) -> None:
        """Add a request that had already been running; it goes before all that never ran."""
        self._count_in(request)
        self._insert_preempted(request)

    def peek(self) -> Request | None:
        """The request to admit next, or None."""
        while (request := self._first()) is not None and request.status is not RequestStatus.WAITING:
            self._drop_first(ends_turn=False)
            self._num_dead -= 1
        return request

    def pop(self) -> Request:
        """Take the request that `peek` showed."""
        request = self.peek()
        assert request is not None, "the waiting queue is empty"
        self._drop_first(ends_turn=True)
        self._count_out(request)
        return request

    def discard(self, request: Request) -> None:
        """Count out a request that was finished while it waited (its status is FINISHED by now)."""
        self._count_out(request)
        self._num_dead += 1
        if self._num_dead > _SWEEP_FROM + len(self):
            self._sweep()
            self._num_dead = 0

    def _count_in(self, request: Request) -> None:
        self._length += 1
        self._num_of[request.spec.tenant] += 1

    def _count_out(self, request: Request) -> None:
        self._length -= 1
        self._num_of[request.spec.tenant] -= 1
        if not self._num_of[request.spec.tenant]:
            del self._num_of[request.spec.tenant]

    @abstractmethod
    def _insert(self, request: Request) -> None: ...

    @abstractmethod
    def _insert_preempted(self, request: Request) -> None: ...

    @abstractmethod
    def _first(self) -> Request | None: ...

    @abstractmethod
    def _drop_first(self, *, ends_turn: bool) -> None: ...

    @abstractmethod
    def _sweep(self) -> None: ...


class FirstComeFirstServedQueue(WaitingQueue):
    """Order of arrival within a tenant; tenants take turns. Preempted requests come before all others.

    With one tenant (no API keys, or one) this is the order of arrival.
    """

    def __init__(self) -> None:
        super().__init__()
        self._preempted: deque[Request] = deque()
        self._tenants: dict[str, deque[Request]] = {}
        self._turns: deque[str] = deque()  # tenants with entries, whose turn is next first

    def _insert(self, request: Request) -> None:
        entries = self._tenants.get(request.spec.tenant)
        if entries is None:
            entries = self._tenants[request.spec.tenant] = deque()
            self._turns.append(request.spec.tenant)
        entries.append(request)

    def _insert_preempted(self, request: Request) -> None:
        self._preempted.appendleft(request)

    def _first(self) -> Request | None:
        if self._preempted:
            return self._preempted[0]
        return self._tenants[self._turns[0]][0] if self._turns else None

    def _drop_first(self, *, ends_turn: bool) -> None:
        if self._preempted:
            self._preempted.popleft()
            return
        tenant = self._turns[0]
        self._tenants[tenant].popleft()
        if not self._tenants[tenant]:
            del self._tenants[tenant]
            self._turns.popleft()
        elif ends_turn:
            self._turns.rotate(-1)

    def _sweep(self) -> None:
        self._preempted = deque(_waiting(self._preempted))
        swept = {tenant: deque(_waiting(entries)) for tenant, entries in self._tenants.items()}
        self._tenants = {tenant: entries for tenant, entries in swept.items() if entries}
        self._turns = deque(tenant for tenant in self._turns if tenant in self._tenants)


class PriorityQueue(WaitingQueue):
    """Lower `priority` first; among equals the order of arrival, which a preempted request keeps."""

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[int, int, Request]] = []

    def _insert(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.spec.priority, request.sequence_number, request))

    _insert_preempted = _insert

    def _first(self) -> Request | None:
        return self._heap[0][2] if self._heap else None

    def _drop_first(self, *, ends_turn: bool) -> None:
        heapq.heappop(self._heap)

    def _sweep(self) -> None:
        self._heap = [entry for entry in self._heap if entry[2].status is RequestStatus.WAITING]
        heapq.heapify(self._heap)


def _waiting(requests: Iterable[Request]) -> Iterator[Request]:
    return (request for request in requests if request.status is RequestStatus.WAITING)


def make_waiting_queue(policy: str) -> WaitingQueue:
    """The queue of a `scheduling_policy`: `fcfs` or `priority`."""
    return {"fcfs": FirstComeFirstServedQueue, "priority": PriorityQueue}[policy]()
