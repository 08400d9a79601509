"""The steps of an engine core, recorded for viewers (`TraceSteps`); without a viewer nothing is recorded.

A message goes out about ten times a second. It has the steps since the last one and the next part of the KV cache's blocks,
so that a large pool is shown within seconds and no step waits for all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import islice

from typing_extensions import override

from pagoda.engine.messages import EngineTrace, TracedBlocks, TracedRow, TracedStep
from pagoda.execution.traced_kernel import Kernels
from pagoda.scheduling.plan import StepPlan
from pagoda.scheduling.request import RequestStatus
from pagoda.scheduling.scheduler import RequestUpdate, Scheduler

_EVERY_SECONDS = 0.1
_BLOCKS_A_MESSAGE = 4096
_MAX_HOLDERS = 64  # running requests whose blocks are listed
_MAX_BLOCKS_OF_HOLDER = 1024
MAX_WAITING = 256


class StepRecorder:
    """Records nothing: what a core has as long as nobody watches it."""

    def record(
        self, number: int, plan: StepPlan, updates: Sequence[RequestUpdate], submitted: float, now: float
    ) -> None:
        """Note step `number`, submitted at `submitted` monotonic seconds, after its result was applied at `now`."""

    def take(self, now: float, *, is_idle: bool) -> EngineTrace | None:
        """The next message, when it is time for one. With the last step before the engine is idle it shows all blocks."""

    def close(self) -> None:
        """Nothing is recorded any more."""


class TracingRecorder(StepRecorder):
    """Collects the steps that are done."""

    def __init__(self, scheduler: Scheduler, kernels: Kernels | None = None) -> None:
        self._scheduler = scheduler
        self._kernels = kernels
        self._steps: list[TracedStep] = []
        self._next_block = 0
        self._num_preemptions = scheduler.num_preemptions
        self._taken_at = float("-inf")
        self._known: AbstractSet[str] = frozenset()
        self._arrivals: list[tuple[str, float]] = []

    @override
    def record(
        self, number: int, plan: StepPlan, updates: Sequence[RequestUpdate], submitted: float, now: float
    ) -> None:
        new = {update.request.spec.request_id: len(update.new_token_ids) for update in updates}
        rows = [
            TracedRow(request_id, computed, scheduled, len(plan.draft_token_ids.get(row, ())), new.get(request_id, 0))
            for row, (request_id, computed, scheduled) in enumerate(
                zip(plan.request_ids, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True)
            )
        ]
        ended = [
            (update.request.spec.request_id, str(update.request.finish_reason))
            for update in updates
            if update.request.finish_reason is not None
        ]
        self._arrivals += [  # of those that came and went between two messages
            (update.request.spec.request_id, update.request.spec.arrival_time)
            for update in updates
            if update.request.finish_reason is not None and update.request.spec.request_id not in self._known
        ]
        num_preemptions = self._scheduler.num_preemptions
        num_preempted, self._num_preemptions = num_preemptions - self._num_preemptions, num_preemptions
        self._steps.append(
            TracedStep(number, submitted, now - submitted, self._scheduler.num_waiting, num_preempted, rows, ended)
        )

    @override
    def take(self, now: float, *, is_idle: bool) -> EngineTrace | None:
        if not is_idle and now - self._taken_at < _EVERY_SECONDS:
            return None
        self._taken_at = now
        steps, self._steps = self._steps, []
        kernels, num_lost = ([], 0) if self._kernels is None else self._kernels.take(now, is_idle=is_idle)
        requests = self._scheduler.requests
        arrivals, self._arrivals = self._arrivals, []
        arrivals += [(name, requests[name].spec.arrival_time) for name in requests.keys() - self._known]
        self._known = set(requests)
        waiting = (name for name, request in requests.items() if request.status is RequestStatus.WAITING)
        return EngineTrace(
            now, steps, self._blocks(is_idle), arrivals, list(islice(waiting, MAX_WAITING)), kernels, num_lost
        )

    @override
    def close(self) -> None:
        if self._kernels is not None:
            self._kernels.close()

    def _blocks(self, is_idle: bool) -> TracedBlocks:
        pool = self._scheduler.kv.pool
        first, count = (0, len(pool.blocks)) if is_idle else (self._next_block, _BLOCKS_A_MESSAGE)
        states = pool.states(first, count)
        self._next_block = first + count if first + count < len(pool.blocks) else 0
        return TracedBlocks(first, states, {} if first else self._holders())

    def _holders(self) -> dict[str, list[int]]:
        running = islice(self._scheduler.running, _MAX_HOLDERS)
        return {
            request.spec.request_id: [
                block.block_id
                for lease in request.leases
                for block in islice(lease.blocks, lease.num_dropped, lease.num_dropped + _MAX_BLOCKS_OF_HOLDER)
            ]
            for request in running
        }
