"""What each tenant has of the engine, and what its share is.

    share of a tenant = its weight / the weights of all tenants that have requests      of request slots, and of KV blocks

A tenant alone has everything. When another one comes, its requests are admitted up to its share at once: requests of tenants
beyond theirs, the newest first, are preempted for them. So that none is preempted for ever, and little is computed twice,

- a tenant within its share loses nothing, and so its oldest requests always run to their end;
- a request that was preempted has its turn first: it computes what preemption cost it, and `MIN_TURN_TOKENS` new tokens;
- a tenant that comes again within `RETURN_STEPS` steps finds a request slot: one of many is left free for as long.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.request import Request
from pagoda.scheduling.waiting_queue import WaitingQueue

RETURN_STEPS = 128
SLOTS_FOR_A_FREE_ONE = 8
"""Fewer request slots are too few to leave one free."""
MIN_TURN_TOKENS = 16
MAX_PASSES = 64
"""Times that others may be admitted before the next request of a tenant that needs more than its share of blocks."""

PreemptionKey = Callable[[Request], tuple[int, int]]
"""Of the running requests of a tenant, the one with the largest key is preempted first."""


class Tenant:
    """A tenant that has requests. `rows`: its running requests, the one that was planned least recently first."""

    __slots__ = ("name", "num_passes", "num_requests", "num_served_tokens", "rows", "weight")

    def __init__(self, name: str, num_served_tokens: float) -> None:
        self.name = name
        self.weight = 1.0
        self.num_requests = 0
        self.rows: dict[Request, None] = {}
        self.num_served_tokens = num_served_tokens  # by its weight, while there were others
        self.num_passes = 0


class TenantShares:
    """The tenants that have requests, by name, and which requests give way to which."""

    def __init__(self, max_num_seqs: int, kv: KVCacheManager, preemption_key: PreemptionKey) -> None:
        self.tenants: dict[str, Tenant] = {}
        self._num_slots = max_num_seqs
        self._leaves_one_free = max_num_seqs >= SLOTS_FOR_A_FREE_ONE
        self._kv = kv
        self._key = preemption_key
        self._turns: dict[
            Request, int
        ] = {}  # of preempted requests: computed tokens up to which they are not preempted
        self._away: dict[str, int] = {}  # tenants without requests, and the step until which they are waited for
        self._num_steps = 0

    @property
    def is_shared(self) -> bool:
        """Whether there are several tenants."""
        return len(self.tenants) > 1

    # ---- what happens to requests ----------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Count a request that was accepted."""
        name = request.spec.tenant
        tenant = self.tenants.get(name)
        if tenant is None:
            # Who comes anew has no claim on the time before.
            served = min((other.num_served_tokens for other in self.tenants.values()), default=0.0)
            tenant = self.tenants[name] = Tenant(name, served)
            self._away.pop(name, None)
        tenant.num_requests += 1
        tenant.weight = request.spec.tenant_weight

    def remove(self, request: Request) -> None:
        """Count out a request that has ended."""
        tenant = self.tenants[request.spec.tenant]
        tenant.num_requests -= 1
        self._turns.pop(request, None)
        if not tenant.num_requests:
            del self.tenants[tenant.name]
            if tenant.name:
                self._away[tenant.name] = self._num_steps + RETURN_STEPS

    def enter(self, request: Request) -> None:
        """A request got a request slot and blocks."""
        tenant = self.tenants[request.spec.tenant]
        tenant.rows[request] = None
        tenant.num_passes = 0
        if request in self._turns:
            self._turns[request] += max(0, self._turns[request] - MIN_TURN_TOKENS - request.num_computed_tokens)

    def leave(self, request: Request) -> None:
        """A request leaves its request slot; called before its computed tokens are forgotten."""
        del self.tenants[request.spec.tenant].rows[request]
        if request.num_preemptions:
            self._turns[request] = request.num_computed_tokens + MIN_TURN_TOKENS

    def note_rows(self, requests: Iterable[Request], num_tokens: Iterable[int]) -> None:
        """These rows were planned, with so many tokens each: while there are several tenants that counts."""
        if self.is_shared:
            for request, count in zip(requests, num_tokens, strict=True):
                tenant = self.tenants[request.spec.tenant]
                tenant.num_served_tokens += count / tenant.weight
                del tenant.rows[request]
                tenant.rows[request] = None

    def begin_step(self) -> None:
        """Count a step."""
        self._num_steps += 1
        if self._away and next(iter(self._away.values())) < self._num_steps:
            self._away = {name: until for name, until in self._away.items() if until >= self._num_steps}

    # ---- who is next -----------------------------------------------------------------------------------------------

    def next_tenant(self, names: Collection[str]) -> Tenant | None:
        """Of these tenants, all of which have requests, the one with fewest rows by its weight, then with least service."""
        if len(names) == 1:
            (name,) = names
            return self.tenants[name]
        return min((self.tenants[name] for name in names), key=_need, default=None)

    def may_admit(self, tenant: Tenant, num_free_slots: int) -> bool:
        """Whether there is a request slot for `tenant` that is not left free for one that was here a moment ago."""
        num_left_free = bool(self._away) and self._leaves_one_free and bool(tenant.rows)
        return num_free_slots > num_left_free

    def claims(self, waiting: WaitingQueue) -> Iterator[Request]:
        """The next request of each tenant that has less than its share, the neediest tenant first."""
        if not self.is_shared or not len(waiting):
            return
        num_blocks = self._kv.pool.num_usable
        for tenant in sorted((self.tenants[name] for name in waiting.tenants), key=_need):
            request = waiting.peek(tenant.name)
            if request.num_in_flight:
                continue  # it must be known what it has
            share = self._share(tenant)
            slots = (len(tenant.rows) + 1) / self._num_slots
            blocks = (self._blocks_of(tenant.rows) + self._kv.blocks_for(request.num_tokens)) / num_blocks
            if not tenant.rows or max(slots, blocks) <= share:
                yield request

    def pass_over(self, request: Request) -> bool:
        """There is no room for the claim of `request`; whether others may be admitted before it all the same."""
        tenant = self.tenants[request.spec.tenant]
        tenant.num_passes += 1
        return tenant.num_passes < MAX_PASSES

    # ---- who gives way ---------------------------------------------------------------------------------------------

    def giving_way_to(self, request: Request, num_free_slots: int) -> list[Request] | None:
        """The running requests to preempt so that there is room for `request`; None where there would not be enough.

        They are of tenants beyond their shares, which keep these, and each has had its turn.
        """
        num_slots = 1 - num_free_slots
        num_blocks = self._kv.blocks_for(request.num_tokens) - self._kv.pool.num_available
        givers = [_Giver(self, tenant) for tenant in self.tenants.values() if tenant.name != request.spec.tenant]
        chosen: list[Request] = []
        while num_slots > 0 or num_blocks > 0:
            giver = max(givers, key=lambda giver: giver.excess, default=None)
            if giver is None or giver.excess <= 0:
                return None
            victim = giver.take()
            if victim is None:
                givers.remove(giver)
                continue
            chosen.append(victim)
            num_slots -= 1
            num_blocks -= _num_blocks(victim)
        return chosen

    def rows_to_preempt(self, running: Collection[Request]) -> Collection[Request]:
        """Where blocks have run out: the running requests of the tenant that is the most beyond its share."""
        if not self.is_shared:
            return running
        return max((tenant for tenant in self.tenants.values() if tenant.rows), key=self.use).rows

    def use(self, tenant: Tenant) -> float:
        """What a tenant has in proportion to its share: of request slots or of blocks, whatever is more."""
        blocks = self._blocks_of(tenant.rows) / self._kv.pool.num_usable
        return max(len(tenant.rows) / self._num_slots, blocks) / self._share(tenant)

    def _share(self, tenant: Tenant) -> float:
        return tenant.weight / sum(other.weight for other in self.tenants.values())

    def _blocks_of(self, rows: Iterable[Request]) -> int:
        return sum(map(_num_blocks, rows))

    def candidates(self, tenant: Tenant) -> list[Request]:
        """The running requests of a tenant that have had their turn; the last is preempted first."""
        rows = (row for row in tenant.rows if row.num_computed_tokens >= self._turns.get(row, 0))
        return sorted(rows, key=self._key)

    def excess(self, tenant: Tenant, num_slots: int, num_blocks: int) -> float:
        """By how much so many slots and blocks are more than the share of `tenant`, which is one request at least."""
        share = self._share(tenant)
        slots = num_slots / self._num_slots - max(share, 1 / self._num_slots)
        return max(slots, num_blocks / self._kv.pool.num_usable - share)


class _Giver:
    """A tenant that may have to give way: what it has left while victims are chosen."""

    def __init__(self, shares: TenantShares, tenant: Tenant) -> None:
        self._shares = shares
        self._tenant = tenant
        self._candidates = shares.candidates(tenant)
        self._num_slots = len(tenant.rows)
        self._num_blocks = sum(map(_num_blocks, tenant.rows))

    @property
    def excess(self) -> float:
        return self._shares.excess(self._tenant, self._num_slots, self._num_blocks)

    def take(self) -> Request | None:
        """The next to preempt, if there is one."""
        if not self._candidates:
            return None
        victim = self._candidates.pop()
        self._num_slots -= 1
        self._num_blocks -= _num_blocks(victim)
        return victim


def _need(tenant: Tenant) -> tuple[float, float]:
    return len(tenant.rows) / tenant.weight, tenant.num_served_tokens


def _num_blocks(request: Request) -> int:
    assert request.lease is not None
    return len(request.lease)
