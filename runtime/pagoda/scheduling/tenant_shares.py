"""What each tenant has of the engine, and what its share is.

    share of a tenant = its weight / the weights of all tenants that have requests      of request slots, and of KV blocks

A tenant's requests of one fairness id are a flow, and its flows have equal parts of its share: what is said of tenants here
holds for flows. A tenant without fairness ids has one.

A tenant alone has everything. When another one comes, its requests are admitted up to its share at once: requests of tenants
beyond theirs, the newest first, are preempted for them. So that none is preempted for ever, and little is computed twice,

- a tenant within its share loses nothing, and so its oldest requests always run to their end;
- a request that was preempted has its turn first: it computes what preemption cost it, and `MIN_TURN_TOKENS` new tokens;
- a tenant that comes again within `RETURN_STEPS` steps finds a request slot: one of many is left free for as long.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from pagoda.request import EngineRequest
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.request import Flow, Request
from pagoda.scheduling.waiting_queue import WaitingQueue

RETURN_STEPS = 128
SLOTS_FOR_A_FREE_ONE = 8
"""Fewer request slots are too few to leave one free."""
MIN_TURN_TOKENS = 16
MAX_FLOWS = 64
"""Flows of one tenant; requests of further fairness ids are of its flow without one."""
MAX_PASSES = 64
"""Times that others may be admitted before the next request of a tenant that needs more than its share of blocks."""

PreemptionKey = Callable[[Request], tuple[int, int]]
"""Of the running requests of a tenant, the one with the largest key is preempted first."""


class Share:
    """What the flows of one tenant share: its weight, and so its turn. `num_rows`: running requests of all of them."""

    __slots__ = ("flows", "num_rows", "weight")

    def __init__(self) -> None:
        self.flows: dict[Flow, Tenant] = {}
        self.num_rows = 0
        self.weight = 1.0


class Tenant:
    """A tenant's flow that has requests. `rows`: its running requests, the one that was planned least recently first."""

    __slots__ = ("flow", "num_passes", "num_requests", "num_served_tokens", "rows", "share")

    def __init__(self, flow: Flow, share: Share, num_served_tokens: float) -> None:
        self.flow = flow
        self.share = share
        self.num_requests = 0
        self.rows: dict[Request, None] = {}
        self.num_served_tokens = num_served_tokens  # by its weight, while there were others
        self.num_passes = 0

    @property
    def weight(self) -> float:
        """An equal part of the tenant's."""
        return self.share.weight / len(self.share.flows)


class TenantShares:
    """The flows of tenants that have requests, and which requests give way to which."""

    def __init__(
        self, max_num_seqs: int, max_model_len: int, kv: KVCacheManager, preemption_key: PreemptionKey
    ) -> None:
        self._max_lead = max_model_len
        self.tenants: dict[Flow, Tenant] = {}
        self._shares: dict[str, Share] = {}  # by the name of the tenant
        self.configure(max_num_seqs)
        self._kv = kv
        self._key = preemption_key
        self._turns: dict[
            Request, int
        ] = {}  # of preempted requests: computed tokens up to which they are not preempted
        self._away: dict[Flow, int] = {}  # tenants without requests, and the step until which they are waited for
        self._num_steps = 0

    def configure(self, max_num_seqs: int) -> None:
        """Share so many request slots from now on."""
        self._num_slots = max_num_seqs
        self._leaves_one_free = max_num_seqs >= SLOTS_FOR_A_FREE_ONE

    @property
    def is_shared(self) -> bool:
        """Whether there are several tenants."""
        return len(self.tenants) > 1

    def parties(self) -> Iterator[list[Tenant]]:
        """Those who share a step: the flows of each tenant together, or where there is one tenant each of its flows."""
        if len(self._shares) == 1:
            return ([tenant] for tenant in self.tenants.values())
        return (list(share.flows.values()) for share in self._shares.values())

    # ---- what happens to requests ----------------------------------------------------------------------------------

    def flow_of(self, spec: EngineRequest) -> Flow:
        """The flow that a request with this record is of."""
        flow = Flow(spec.tenant, spec.fairness_id)
        if not spec.fairness_id or flow in self.tenants:
            return flow
        share = self._shares.get(spec.tenant)
        return flow if share is None or len(share.flows) < MAX_FLOWS else Flow(spec.tenant, "")

    def add(self, request: Request) -> None:
        """Count a request that was accepted."""
        flow = request.flow
        tenant = self.tenants.get(flow)
        if tenant is None:
            share = self._shares.setdefault(flow.tenant, Share())
            # Who comes anew has no claim on the time before.
            served = min((other.num_served_tokens for other in self.tenants.values()), default=0.0)
            tenant = self.tenants[flow] = share.flows[flow] = Tenant(flow, share, served)
            self._away.pop(flow, None)
        tenant.num_requests += 1
        tenant.share.weight = request.spec.tenant_weight

    def remove(self, request: Request) -> None:
        """Count out a request that has ended."""
        flow = request.flow
        tenant = self.tenants[flow]
        tenant.num_requests -= 1
        self._turns.pop(request, None)
        if not tenant.num_requests:
            del self.tenants[flow]
            del tenant.share.flows[flow]
            if not tenant.share.flows:
                del self._shares[flow.tenant]
            if any(flow):
                self._away[flow] = self._num_steps + RETURN_STEPS

    def enter(self, request: Request) -> None:
        """A request got a request slot and blocks."""
        tenant = self.tenants[request.flow]
        tenant.rows[request] = None
        tenant.share.num_rows += 1
        tenant.num_passes = 0
        if request in self._turns:
            self._turns[request] += max(0, self._turns[request] - MIN_TURN_TOKENS - request.num_computed_tokens)

    def leave(self, request: Request) -> None:
        """A request leaves its request slot; called before its computed tokens are forgotten."""
        tenant = self.tenants[request.flow]
        del tenant.rows[request]
        tenant.share.num_rows -= 1
        if request.num_preemptions:
            self._turns[request] = request.num_computed_tokens + MIN_TURN_TOKENS

    def note_rows(self, requests: Iterable[Request], num_tokens: Iterable[int]) -> None:
        """These rows were planned, with so many tokens each: while there are several tenants that counts."""
        if self.is_shared:
            for request, count in zip(requests, num_tokens, strict=True):
                tenant = self.tenants[request.flow]
                tenant.num_served_tokens += count / tenant.weight
                del tenant.rows[request]
                tenant.rows[request] = None

    def begin_step(self) -> None:
        """Count a step.

        What a tenant had because others wanted less is not held against it when they want more: none is ahead of the one that
        was served least by more than the longest request. Else one that comes anew would go first until it had caught up.
        """
        self._num_steps += 1
        if self.is_shared:
            most = min(tenant.num_served_tokens for tenant in self.tenants.values()) + self._max_lead
            for tenant in self.tenants.values():
                tenant.num_served_tokens = min(tenant.num_served_tokens, most)
        if self._away and next(iter(self._away.values())) < self._num_steps:
            self._away = {flow: until for flow, until in self._away.items() if until >= self._num_steps}

    # ---- who is next -----------------------------------------------------------------------------------------------

    def next_tenant(self, flows: Collection[Flow]) -> Tenant | None:
        """Of these flows, all of which have requests, the one with fewest rows by its weight, then with least service.

        First of the tenant with fewest rows by its weight.
        """
        if len(flows) == 1:
            (flow,) = flows
            return self.tenants[flow]
        return min((self.tenants[flow] for flow in flows), key=_need, default=None)

    def need_of(self, request: Request) -> tuple[float, float, float]:
        """Whose request comes first: of two flows, that with the smaller key."""
        return _need(self.tenants[request.flow])

    def may_admit(self, tenant: Tenant, num_free_slots: int) -> bool:
        """Whether there is a request slot for `tenant` that is not left free for one that was here a moment ago."""
        num_left_free = bool(self._away) and self._leaves_one_free and bool(tenant.rows)
        return num_free_slots > num_left_free

    def claims(self, waiting: WaitingQueue) -> Iterator[Request]:
        """The next request of each tenant that has less than its share, the neediest tenant first."""
        if not self.is_shared or not len(waiting):
            return
        num_blocks = self._kv.pool.num_usable
        for tenant in sorted((self.tenants[flow] for flow in waiting.flows), key=_need):
            request = waiting.peek(tenant.flow)
            if request.num_in_flight:
                continue  # it must be known what it has
            share = self._share(tenant)
            slots = (len(tenant.rows) + 1) / self._num_slots
            blocks = (self._blocks_of(tenant.rows) + self._kv.most_blocks(request.num_tokens)) / num_blocks
            if not tenant.rows or max(slots, blocks) <= share:
                yield request

    def pass_over(self, request: Request) -> bool:
        """There is no room for the claim of `request`; whether others may be admitted before it all the same."""
        tenant = self.tenants[request.flow]
        tenant.num_passes += 1
        return tenant.num_passes < MAX_PASSES

    # ---- who gives way ---------------------------------------------------------------------------------------------

    def giving_way_to(self, request: Request, num_free_slots: int) -> list[Request] | None:
        """The running requests to preempt so that there is room for `request`; None where there would not be enough.

        They are of tenants beyond their shares, which keep these, and each has had its turn.
        """
        num_slots = 1 - num_free_slots
        num_blocks = self._kv.most_blocks(request.num_tokens) - self._kv.pool.num_available
        # A flow gives way to another of its tenant by what it has itself, and to other tenants by what its tenant has in all.
        others = {name: _Holding(self, share.weight) for name, share in self._shares.items()}
        givers = []
        for tenant in self.tenants.values():
            whole = others[tenant.flow.tenant]
            whole.add(tenant.rows)
            if tenant.flow != request.flow:
                own = _Holding(self, tenant.weight)
                own.add(tenant.rows)
                is_kin = tenant.flow.tenant == request.flow.tenant
                givers.append(_Giver(self.candidates(tenant), own, own if is_kin else whole))
        chosen: list[Request] = []
        while num_slots > 0 or num_blocks > 0:
            giver = max(givers, key=lambda giver: (giver.whole.excess, giver.own.num_slots), default=None)
            if giver is None or giver.whole.excess <= 0:
                return None
            victim = giver.take()
            if victim is None:
                givers.remove(giver)
                continue
            chosen.append(victim)
            num_slots -= 1
            num_blocks -= victim.num_blocks
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
        return tenant.weight / self._weights()

    def _weights(self) -> float:
        return sum(share.weight for share in self._shares.values())

    def _blocks_of(self, rows: Iterable[Request]) -> int:
        return sum(row.num_blocks for row in rows)

    def candidates(self, tenant: Tenant) -> list[Request]:
        """The running requests of a tenant that have had their turn; the last is preempted first."""
        rows = (row for row in tenant.rows if row.num_computed_tokens >= self._turns.get(row, 0))
        return sorted(rows, key=self._key)

    def excess(self, weight: float, num_slots: int, num_blocks: int) -> float:
        """By how much so many slots and blocks are more than the share of this weight, which is one request at least."""
        share = weight / self._weights()
        slots = num_slots / self._num_slots - max(share, 1 / self._num_slots)
        return max(slots, num_blocks / self._kv.pool.num_usable - share)


class _Holding:
    """What a flow or a tenant of some weight has left while victims are chosen."""

    def __init__(self, shares: TenantShares, weight: float) -> None:
        self._shares = shares
        self._weight = weight
        self.num_slots = 0
        self._num_blocks = 0

    def add(self, rows: Collection[Request]) -> None:
        """Count these rows."""
        self.num_slots += len(rows)
        self._num_blocks += sum(row.num_blocks for row in rows)

    def lose(self, row: Request) -> None:
        """Count a victim out."""
        self.num_slots -= 1
        self._num_blocks -= row.num_blocks

    @property
    def excess(self) -> float:
        """By how much it is beyond its share."""
        return self._shares.excess(self._weight, self.num_slots, self._num_blocks)


class _Giver:
    """A flow that may have to give way: its rows, what it has itself, and what counts against the one that asks."""

    def __init__(self, candidates: list[Request], own: _Holding, whole: _Holding) -> None:
        self._candidates = candidates
        self.own = own
        self.whole = whole

    def take(self) -> Request | None:
        """The next to preempt, if there is one."""
        if not self._candidates:
            return None
        victim = self._candidates.pop()
        self.own.lose(victim)
        if self.whole is not self.own:
            self.whole.lose(victim)
        return victim


def _need(tenant: Tenant) -> tuple[float, float, float]:
    share = tenant.share
    return share.num_rows / share.weight, len(tenant.rows) / tenant.weight, tenant.num_served_tokens
