"""A bounded number at a time, and turns by tenant for the rest: for pools of workers that tenants share."""

from __future__ import annotations

import asyncio
from collections import deque

from pagoda.errors import QueueFullError


def has_place(num_waiting: int, limit: int, num_own: int, num_tenants: int) -> bool:
    """Whether one more may wait where `limit` may: any of a tenant with less than an equal part, if others have taken them.

    `num_tenants`: of those that wait and the one that asks, which has `num_own` waiting.
    """
    return num_waiting < limit or num_own < limit // num_tenants


class _Tenant:
    __slots__ = ("next_turn", "waiting", "weight")

    def __init__(self, weight: float, now: float) -> None:
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.weight = weight
        self.next_turn = now + 1 / weight


class FairTurns:
    """At most `size` turns at a time in one event loop.

    Those who wait are served by tenant (start-time fair queueing), each tenant's in order: the first of a tenant waits for one
    turn of each other tenant at most, however many these have waiting. `max_waiting` bounds them all together; a tenant with
    less than an equal part of that is not refused when others have taken it. `what` is named in the error.
    """

    def __init__(self, size: int, max_waiting: int, what: str) -> None:
        self._num_free = size
        self._max_waiting = max_waiting
        self._what = what
        self._tenants: dict[str, _Tenant] = {}  # those who wait
        self._num_waiting = 0
        self._now = 0.0  # the turn that was given last

    @property
    def num_waiting(self) -> int:
        """How many wait for their turn."""
        return self._num_waiting

    async def take(self, name: str, weight: float, timeout: float | None = None) -> None:
        """Wait for a turn of the tenant `name`, which `give_back` ends.

        Raises `QueueFullError` where too many wait, `TimeoutError` after `timeout` seconds.
        """
        if self._num_free:
            self._num_free -= 1
            return
        tenant = self._tenants.get(name)
        if tenant is None:
            self._check_room(name, 0, len(self._tenants) + 1)
            tenant = self._tenants[name] = _Tenant(weight, self._now)
        else:
            self._check_room(name, len(tenant.waiting), len(self._tenants))
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        tenant.waiting.append(granted)
        self._num_waiting += 1
        try:
            async with asyncio.timeout(timeout):
                await granted
        except BaseException:  # raised on: a turn that came at the last moment is another's
            if not granted.cancelled():
                self.give_back()
            elif granted in tenant.waiting:
                self._count_out(name, tenant, granted)
            raise

    def _check_room(self, name: str, num_own: int, num_tenants: int) -> None:
        if not has_place(self._num_waiting, self._max_waiting, num_own, num_tenants):
            whose = f", {num_own} of them of this API key" if name else ""
            raise QueueFullError(f"{self._num_waiting} requests wait for {self._what}{whose}; {self._max_waiting} may")

    def give_back(self) -> None:
        """A turn has ended: the next begins."""
        while self._tenants:
            name, tenant = min(self._tenants.items(), key=lambda item: item[1].next_turn)
            granted = tenant.waiting[0]
            self._count_out(name, tenant, granted)
            if not granted.cancelled():  # else it has left, and does not know yet that it may
                self._now = tenant.next_turn
                tenant.next_turn += 1 / tenant.weight
                granted.set_result(None)
                return
        self._num_free += 1

    def _count_out(self, name: str, tenant: _Tenant, granted: asyncio.Future[None]) -> None:
        tenant.waiting.remove(granted)
        self._num_waiting -= 1
        if not tenant.waiting:
            del self._tenants[name]
