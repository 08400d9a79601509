"""The unified scheduler: which tokens of which requests run in the next step.

There is no prefill and no decode phase. Every request has `num_computed_tokens`, which catches up with its tokens, and a step
advances these counters under one token budget:

    running:  R1 ▪            R2 ▪            R3 ▪▪▪▪▪▪▪▪ (a chunk of its prompt)
    waiting:  R4 ▪▪▪▪▪▪ …     admitted while budget, request slots and blocks last

Running requests come first. One that needs a block when none is left preempts the running request of lowest priority: its
blocks are freed, and it waits at the front to be recomputed (its published blocks usually still hit). A step that preempted
admits no request. A request whose LoRA adapter has to wait steps aside, see `AdapterGate`.

Whose requests are admitted and preempted where there are several tenants is up to `TenantShares`, and what of a step each of
them, and prompts beside rows that decode, may have is up to `StepComposer`.

Plans may be made while earlier ones are in flight: counters advance when a step is planned, and `Request.num_in_flight` counts
the sampled tokens that are not known yet.

With pipeline stages a request can be planned again only when its last sampled token is known. So each plan takes its share
of the requests that decode, and all stages have a batch to work on:

    stage 0:  plan 0 (R1 R2)   plan 1 (R3 R4)   plan 2 (R1 R2)   plan 3 (R3 R4) …
    stage 1:                   plan 0 (R1 R2)   plan 1 (R3 R4)   plan 2 (R1 R2) …
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from pagoda.adapters import LoraAdapter
from pagoda.errors import ErrorKind, InvalidRequestError, QueueFullError
from pagoda.fair_turns import has_place
from pagoda.pooling.output import PooledOutput
from pagoda.sampling.output import FinishReason, TokenLogprobs
from pagoda.scheduling.adapter_gate import AdapterGate
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.deadlines import Deadlines
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.lookahead import Lookahead, MultiStep
from pagoda.scheduling.plan import StepPlan, StepResult
from pagoda.scheduling.planned_step import PlannedStep
from pagoda.scheduling.repetition_detection import RepetitionDetector
from pagoda.scheduling.request import Request, RequestStatus
from pagoda.scheduling.speculation_stats import SpeculationStats
from pagoda.scheduling.step_composition import StepComposer, StepComposition
from pagoda.scheduling.tenant_shares import TenantShares
from pagoda.scheduling.token_budget import TokenBudget
from pagoda.scheduling.waiting_queue import WaitingQueue


@dataclass(slots=True)
class RequestUpdate:
    """New tokens of one request, and (on the request itself) whether and why it ended."""

    request: Request
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    pooled: PooledOutput | None = None


class Scheduler:
    """Owns all requests of an engine from `add` until their one final update."""

    def __init__(
        self,
        limits: SchedulerLimits,
        kv: KVCacheManager,
        clock: Callable[[], float] = time.monotonic,
        lookahead: Lookahead | None = None,
    ) -> None:
        """`lookahead`: what rows do beyond the next token; None: what `limits.num_scheduler_steps` says."""
        self.limits = limits
        self._num_req_indices = limits.max_num_seqs
        self.kv = kv
        self._clock = clock
        self.num_preemptions = 0
        self.repetition = RepetitionDetector(limits)
        self.speculation = SpeculationStats(num_accepted_per_position=[0] * limits.num_speculative_tokens)
        self._lookahead = lookahead or (MultiStep(limits, kv) if limits.num_scheduler_steps > 1 else Lookahead())
        self._budget = TokenBudget(limits.max_num_batched_tokens)
        self._deadlines = Deadlines(limits.max_request_seconds, clock)
        self._requests: dict[str, Request] = {}
        self._waiting = WaitingQueue(limits.policy)
        self._shares = TenantShares(limits.max_num_seqs, limits.max_model_len, kv, self._priority_key)
        self.adapters = AdapterGate(limits.max_loras, limits.max_cpu_loras, self._adapter_order)
        self._composer = StepComposer(limits, self._shares)
        self._running: dict[str, Request] = {}
        self._entering: dict[Request, None] = {}  # running, and in no plan yet
        self._free_req_indices = _all_req_indices(limits.max_num_seqs)
        self._released_req_indices: list[int] = []
        self._in_flight: dict[int, PlannedStep] = {}  # by step id
        self._first_left_out: Request | None = None  # by the budget of the last plan
        self._ended: list[RequestUpdate] = []
        self._num_arrived = 0
        self._num_steps = 0
        self._last_result_at = clock()

    # ---- adding and ending requests -------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Requests that hold a request slot."""
        return len(self._running)

    @property
    def _num_free(self) -> int:
        """Request slots that may be taken; fewer than there are where `max_num_seqs` was lowered."""
        return min(len(self._free_req_indices), max(0, self.limits.max_num_seqs - len(self._running)))

    @property
    def num_waiting(self) -> int:
        """Requests that wait for admission, preempted ones included."""
        return len(self._waiting) + self.adapters.num_parked

    @property
    def degradation(self) -> str:
        """A description of the reduced token budget; empty at the full budget."""
        return self._budget.shortage

    @property
    def has_work(self) -> bool:
        """Whether any request has not had its final update yet."""
        return bool(self._requests) or bool(self._ended)

    def add(self, request: Request) -> None:
        """Accept a request.

        Raises `InvalidRequestError` for one that could never run, and would block the queue, or whose id is in use,
        and `QueueFullError` when too many wait; then nothing is changed. `max_tokens` is lowered to what
        `max_model_len` and the KV cache can hold, so a request that has all blocks to itself always ends by its length before
        it runs out of them.
        """
        if request.spec.request_id in self._requests:
            raise InvalidRequestError(
                f"a request with id {request.spec.request_id!r} is in the engine already", "request_id"
            )
        if request.num_prompt_tokens == 0:
            raise InvalidRequestError("the prompt is empty: at least one token is needed", "prompt")
        limits = self.limits
        longest = self._longest_prompt()
        if request.num_prompt_tokens > longest:
            raise InvalidRequestError(
                f"the prompt has {request.num_prompt_tokens} tokens; at most {longest} can be served "
                f"(max_model_len is {limits.max_model_len}, the KV cache holds {self.kv.max_tokens_of_a_request - 1})",
                "prompt",
            )
        request.flow = self._shares.flow_of(request.spec)
        if not request.spec.has_place:
            self._check_queue(request.spec.tenant)
        request.max_tokens = min(request.max_tokens, longest + 1 - request.num_prompt_tokens)
        request.sequence_number = self._num_arrived
        self._num_arrived += 1
        request.waits_for_output = limits.pipeline_parallel_size > 1 or request.constraint is not None
        self._lookahead.add(request)
        self._requests[request.spec.request_id] = request
        self._shares.add(request)
        self.adapters.add(request)
        self._waiting.push(request)
        self._deadlines.add(request)

    def _longest_prompt(self) -> int:
        """Tokens of the longest prompt, which leaves a place for a token behind it."""
        return min(self.limits.max_model_len, self.kv.max_tokens_of_a_request) - 1

    def _check_queue(self, tenant: str) -> None:
        """Raise `QueueFullError` where `tenant` may not have one more request wait.

        All of them together have `max_num_waiting` places. A tenant with less than an equal part of these is not refused when
        others have taken them, so that the queue may become longer by the parts of those that came late.
        """
        # Requests for which a request slot is free do not count: the next step may admit them.
        num_waiting = max(0, self.num_waiting - self._num_free)
        limit = self.limits.max_num_waiting
        if num_waiting < limit:
            return
        num_of = Counter({tenant: 0})
        for flow in self._waiting.flows:
            num_of[flow.tenant] += self._waiting.num_of(flow)
        num_of.update(request.flow.tenant for request in self.adapters.parked)
        num_own, num_tenants = num_of[tenant], len(num_of)
        if has_place(num_waiting, limit, num_own, num_tenants):
            return
        if num_tenants == 1:
            raise QueueFullError(f"{num_waiting} requests are waiting, as many as max_num_waiting allows")
        raise QueueFullError(
            f"{num_waiting} requests are waiting, {num_own} of them of this API key; with max_num_waiting of {limit} each of "
            f"{num_tenants} keys has {limit // num_tenants} places"
        )

    def configure(self, limits: SchedulerLimits) -> None:
        """Plan within other limits from the next step on; what runs goes on. None may exceed what was sized at start:

        `max_num_seqs`, `max_num_batched_tokens`, `num_speculative_tokens`.
        """
        self.limits = limits
        self._budget.configure(limits.max_num_batched_tokens)
        self._deadlines.max_seconds = limits.max_request_seconds
        self.repetition.configure(limits)
        self._shares.configure(limits.max_num_seqs)
        self._composer.configure(limits)
        self._lookahead.configure(limits)

    @property
    def requests(self) -> Mapping[str, Request]:
        """Those that have not ended, by their ids."""
        return self._requests

    @property
    def running(self) -> Collection[Request]:
        """The requests that hold a request slot, in order of admission."""
        return self._running.values()

    def requests_of(self, plan: StepPlan) -> list[Request]:
        """The requests of a plan's rows, until its result is applied."""
        return self._in_flight[plan.step_id].requests

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests with ABORT, in any state. Unknown ids (already ended) are ignored."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                request.finish_reason = FinishReason.ABORT
                self._finish(request)
                self._ended.append(RequestUpdate(request, []))

    def fail(self, request: Request, kind: ErrorKind, message: str) -> None:
        """End one request with an error; nothing happens if it has ended already."""
        if not request.is_finished:
            request.finish_reason = FinishReason.ERROR
            request.error_kind, request.error = kind, message
            self._finish(request)
            self._ended.append(RequestUpdate(request, []))

    def reset_prefix_cache(self) -> None:
        """Let no later request find what is cached now; requests that share blocks keep them."""
        self.kv.forget_prefixes()

    def fail_requests_of(self, adapter: LoraAdapter, kind: ErrorKind, message: str) -> None:
        """An adapter could not be loaded: what waits for it ends with an error."""
        for request in [each for each in self._requests.values() if each.spec.adapter == adapter]:
            self.fail(request, kind, message)

    def fail_in_flight(self, message: str) -> None:
        """A step raised: the requests of all steps in flight end with an error.

        Blocks published by these steps may lack their content, so the prefix cache is reset.
        """
        steps, self._in_flight = self._in_flight, {}
        for step in steps.values():
            for _, request in step.rows():
                self.fail(request, ErrorKind.INTERNAL, message)
        self.kv.forget_prefixes()

    def retry_in_flight(self) -> bool:
        """A step ran out of device memory: halve the token budget and preempt the requests in flight, to plan them again.

        They keep their tokens and wait at the front. False, and no change, when the budget cannot shrink any more.
        """
        if not self._budget.shrink():
            return False
        steps, self._in_flight = self._in_flight, {}
        self._recompute({request for step in steps.values() for _, request in step.rows() if not request.is_finished})
        return True

    def take_ended(self) -> list[RequestUpdate]:
        """Requests that ended outside of a step's result (aborted or failed) since the last call."""
        ended, self._ended = self._ended, []
        return ended

    # ---- planning -------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or None when nothing can run: idle, or everything waits for steps in flight."""
        for request in self._deadlines.take_overdue():
            request.finish_reason, request.stop_reason = FinishReason.LENGTH, "max_request_seconds"
            self._finish(request)
            self._ended.append(RequestUpdate(request, []))
        self._shares.begin_step()
        for request in reversed(self.adapters.unpark()):
            self._waiting.push_preempted(request)
        self._admit_claims()
        composition, scheduled, preempted = self._schedule_running()
        gave_way = preempted
        while gave_way and not scheduled:
            # All requests of this plan's share were preempted: take the next share.
            composition, scheduled, gave_way = self._schedule_running()
        budget = self._budget.tokens - sum(scheduled.values())
        step = PlannedStep(StepPlan(step_id=self._num_steps), self._clock(), composition.num_base_tokens)
        for request in [entering for entering in self._entering if entering in scheduled]:
            self._enter(step, request)
        self._add_rows(step, list(scheduled), list(scheduled.values()))
        if not preempted:
            self._admit_waiting(step, composition, budget)
        if not step.requests:
            return None
        self._lookahead.extend(step, composition.num_tokens, len(self._running))
        step.plan.new_blocks = self.kv.take_new_blocks(self._entering)
        self.kv.finish_plan()
        step.plan.released_req_indices, self._released_req_indices = self._released_req_indices, []
        self._in_flight[self._num_steps] = step
        self._num_steps += 1
        return step.plan

    def _schedule_running(self) -> tuple[StepComposition, dict[Request, int], bool]:
        """How many tokens each running request moves forward, and whether any was preempted for it."""
        scheduled: dict[Request, int] = {}
        budget = self._budget.tokens
        preempted = False
        candidates = self._candidates()
        composition = self._composer.compose(candidates, self._waiting, self._num_free, budget)
        for request, limit in zip(composition.candidates, composition.limits, strict=False):
            num_new = min(request.next_tokens(), budget, limit)
            if num_new == 0 or request.req_index < 0:
                continue  # nothing to do, no budget, or preempted a moment ago for one before it
            while not self.kv.advance(request, num_new):
                victim = self._choose_victim()
                budget += scheduled.pop(victim, 0)
                self._preempt(victim)
                preempted = True
                if victim is request:
                    break
            else:
                scheduled[request] = num_new
                budget -= num_new
        self._first_left_out = None if budget else self._first_without_tokens(candidates, scheduled)
        return composition, scheduled, preempted

    def _first_without_tokens(self, candidates: list[Request], scheduled: dict[Request, int]) -> Request | None:
        """The first request that could run and for which the budget had no tokens left."""
        return next(
            (one for one in candidates if one not in scheduled and one.req_index >= 0 and one.next_tokens()), None
        )

    def _candidates(self) -> list[Request]:
        """The running requests that this plan may move forward, the oldest first.

        Where the budget is smaller than their number, which it may be after out-of-memory, they take turns: it begins with the
        first that the last plan left out.
        """
        running = list(self._running.values())
        if self._budget.tokens < len(running) and self._first_left_out in running:
            first = running.index(self._first_left_out)
            running = running[first:] + running[:first]
        num_stages = self.limits.pipeline_parallel_size
        if num_stages == 1:
            return running
        # The last `num_stages` plans are in flight together, and each takes its share: no request is left out by all of them.
        max_decodes = -(-len(running) // num_stages)
        candidates = []
        for request in running:
            decodes = request.next_tokens() == 1
            if request.must_wait_for_output or (decodes and max_decodes == 0):
                continue
            max_decodes -= decodes
            candidates.append(request)
        return candidates

    def _admit_claims(self) -> None:
        """Admit requests of tenants that have less than their share, before those that run get anything.

        Where there is no room for one, running requests of tenants with more than their share are preempted for it.
        """
        while (request := self._admit_claim()) is not None:
            self._waiting.pop(request.flow)
            self._assign_req_index(request)

    def _admit_claim(self) -> Request | None:
        for request in self._shares.claims(self._waiting):
            if not self.adapters.admits(request):
                self._park(request)
                continue
            victims = self._shares.giving_way_to(request, self._num_free)
            for victim in victims or ():
                self._preempt(victim)
            # Their blocks may be shared with others, and so still be held.
            if victims is not None and self.kv.allocate_for(request, self._budget.tokens, leave_watermark=False):
                return request
            if not self._shares.pass_over(request):
                break
        return None

    def _admit_waiting(self, step: PlannedStep, composition: StepComposition, budget: int) -> None:
        """Admit waiting requests in turn while budget, request slots and blocks last; none is skipped within a tenant."""
        flows = list(self._waiting.flows)
        while budget > 0 and self._num_free and (tenant := self._shares.next_tenant(flows)) is not None:
            chunk = composition.allowed(tenant.flow)
            if not chunk or not self._shares.may_admit(tenant, self._num_free):
                flows.remove(tenant.flow)
                continue
            request = self._waiting.peek(tenant.flow)
            if request.num_in_flight:
                break  # preempted with a token in flight, which must be known first
            if not self.adapters.admits(request):
                self._park(request)
                if not self._waiting.num_of(tenant.flow):
                    flows.remove(tenant.flow)
                continue
            room = self._room_for(request, min(budget, chunk), step)
            if not room:
                break
            if not self.kv.allocate_for(request, room, leave_watermark=bool(self._running)):
                break
            self._waiting.pop(tenant.flow)
            if not self._waiting.num_of(tenant.flow):
                flows.remove(tenant.flow)
            self._assign_req_index(request)
            self._enter(step, request)
            num_new = min(request.next_tokens(), room)
            budget -= num_new
            composition.use(tenant.flow, num_new)
            # The row publishes its blocks at once, so the next in line with the same prompt shares them within this very
            # step: in every layer all KV is written before any of it is read. (Not so where a group keeps states: its blocks
            # are found from the next plan on.)
            self._add_rows(step, [request], [num_new])

    def _park(self, request: Request) -> None:
        """Take the next request of its flow out of the queue: its adapter has to wait, those behind it do not."""
        self._waiting.pop(request.flow)
        self.adapters.park(request)

    def _adapter_order(self, request: Request) -> tuple[tuple[float, ...], tuple[int, int]]:
        return self._shares.need_of(request), self._priority_key(request)

    def _room_for(self, request: Request, room: int, step: PlannedStep) -> int:
        """How many tokens `request` may have of the `room` that is left in `step`; 0: it waits."""
        del request, step
        return room

    def _assign_req_index(self, request: Request) -> None:
        """Move an admitted request into a request slot."""
        request.status = RequestStatus.RUNNING
        request.req_index = self._free_req_indices.pop()
        if request.scheduled_time is None:
            request.scheduled_time = self._clock()
        self._running[request.spec.request_id] = request
        self._entering[request] = None
        self._shares.enter(request)
        self.adapters.enter(request)
        self._composer.prompts[request] = None

    def _enter(self, step: PlannedStep, request: Request) -> None:
        """Give a running request that was in no plan yet to the first one with a row of it."""
        del self._entering[request]
        step.enter(request)

    def _add_rows(self, step: PlannedStep, requests: list[Request], num_new: list[int]) -> None:
        """Plan so many tokens of each of these running requests, and publish the blocks that they fill."""
        first = len(step.requests)
        step.add_rows(requests, num_new)
        self._composer.note_rows(requests, step.plan.samples[first:])
        self._shares.note_rows(requests, num_new)
        self.kv.publish(requests)

    def _priority_key(self, request: Request) -> tuple[int, int]:
        """Sorts by falling priority; the last is preempted first."""
        priority = request.spec.priority if self.limits.policy == "priority" else 0
        return priority, request.sequence_number

    def _choose_victim(self) -> Request:
        """The running request to preempt: lowest priority, among those not preempted too often while there are any."""
        protected_from = self.limits.max_preemptions
        rows = self._shares.rows_to_preempt(self._running.values())
        candidates = [request for request in rows if request.num_preemptions < protected_from]
        victim = max(candidates or rows, key=self._priority_key)
        assert len(self._running) > 1, "a request that has all blocks to itself ends by its length, never here"
        return victim

    def _preempt(self, request: Request) -> None:
        """Free a running request's blocks and request slot, and return it to the waiting queue."""
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._return_to_waiting(request)

    def _recompute(self, requests: set[Request]) -> None:
        """Preempt these requests, to recompute them from their known tokens; tokens in flight are dropped.

        The prefix cache is reset: blocks with missing or wrong KV may be in it.
        """
        for request in sorted(requests, key=self._priority_key, reverse=True):
            request.num_in_flight = 0
            if request.status is RequestStatus.RUNNING:
                self._return_to_waiting(request)
        self.kv.forget_prefixes()

    def _return_to_waiting(self, request: Request) -> None:
        """Free everything of a running request but its tokens; it waits at the front to be recomputed."""
        self._free_req_index(request)
        self.kv.release(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        self._waiting.push_preempted(request)

    def _free_req_index(self, request: Request) -> None:
        del self._running[request.spec.request_id]
        self._shares.leave(request)
        self.adapters.leave(request)
        self._composer.prompts.pop(request, None)
        self._free_req_indices.append(request.req_index)
        if request in self._entering:
            del self._entering[request]  # no plan has it
        else:
            self._released_req_indices.append(request.req_index)
        request.req_index = -1

    def _finish(self, request: Request) -> None:
        """End a request in any state, and free its request slot and blocks."""
        was_running = request.status is RequestStatus.RUNNING
        if was_running:
            self._free_req_index(request)
        request.status = RequestStatus.FINISHED
        was_parked = self.adapters.remove(request)
        if not (was_running or was_parked):
            self._waiting.discard(request)
        self.kv.release(request)
        self._lookahead.remove(request)
        self._shares.remove(request)
        del self._requests[request.spec.request_id]

    # ---- results --------------------------------------------------------------------------------------------------

    def apply(self, plan: StepPlan, result: StepResult) -> list[RequestUpdate]:
        """Take the result of a plan, oldest plan first. Rows of requests that have ended are ignored."""
        updates: list[RequestUpdate] = []
        self._budget.count_good_step()
        step = self._in_flight.pop(plan.step_id)
        self._note_time(step)
        if result.errors:
            self._fail_rows(step, result.errors)
        if plan.draft_token_ids:
            self._take_back_refused(step, result)
        for row, request in step.rows():
            if request.status is RequestStatus.FINISHED:
                continue
            request.num_in_flight -= plan.num_steps[row] if plan.num_steps else plan.samples[row]
            if request.prompt_logprobs is not None:
                entries = result.prompt_logprobs.get(row, [])
                request.collect_prompt_logprobs(plan.num_computed_tokens[row], entries)
            if plan.samples[row]:
                updates.append(self._take_output(request, row, result))
            if row in result.draft_token_ids:
                self._lookahead.receive(request, result.draft_token_ids[row])
        return updates

    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """The turn of the engine's loop that ended with the result of `plan` took so long."""
        self._lookahead.observe(plan, result, seconds)

    def calibrate(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """A plan of no request, made to be measured, took so long."""
        self._lookahead.calibrate(plan, result, seconds)

    def _take_back_refused(self, step: PlannedStep, result: StepResult) -> None:
        """Let the counters of requests with drafts fall back to what was verified; their blocks stay."""
        drafts = step.plan.draft_token_ids
        for row, request in step.rows():
            if row not in drafts or request.status is RequestStatus.FINISHED:
                continue
            num_drafts, num_accepted = len(drafts[row]), len(result.sampled_token_ids[row]) - 1
            request.num_draft_tokens += num_drafts
            request.num_accepted_tokens += num_accepted
            self.speculation.count(num_drafts, num_accepted)
            request.num_in_flight -= num_drafts
            if request.status is RequestStatus.RUNNING:  # one that was preempted meanwhile is computed anew
                request.num_computed_tokens -= num_drafts - num_accepted

    def _note_time(self, step: PlannedStep) -> None:
        """Learn from a step: it ran since it was planned or, when others were in flight, since the result before."""
        now = self._clock()
        seconds = now - max(step.planned_at, self._last_result_at)
        self._last_result_at = now
        if not step.plan.num_steps:
            num_tokens = step.plan.total_tokens
            num_base = step.num_base_tokens
            base = num_tokens if num_base is None else min(num_base, num_tokens)
            self._composer.note_time(num_tokens, base, seconds, only_decodes=step.only_decodes)

    def _fail_rows(self, step: PlannedStep, errors: dict[int, str]) -> None:
        """End the requests of failed rows, and recompute the requests that share blocks which these rows should have written.

        A failed row may not have run, so the KV of its blocks is missing or wrong. But the blocks were published when the row
        was planned: requests admitted in this step or in a later one in flight may have found them in the prefix cache.
        """
        in_flight = (step, *self._in_flight.values())
        # Some that have rows are preempted by now, and some that were admitted had no row yet.
        candidates = {request for planned in in_flight for _, request in planned.rows()} | set(self._running.values())
        affected: set[Request] = set()
        for row, error in errors.items():
            writer, position = step.requests[row], step.plan.num_computed_tokens[row]
            if writer not in step.discarded:
                self.fail(writer, ErrorKind.INTERNAL, error)
                affected.add(writer)
                affected |= {other for other in candidates if self.kv.shares_blocks_from(other, writer, position)}
        for planned in in_flight:
            # The later rows of a request that ended here bring nothing new.
            planned.discarded |= affected.intersection(planned.requests)
        self._recompute({request for request in affected if not request.is_finished})

    def _take_output(self, request: Request, row: int, result: StepResult) -> RequestUpdate:
        """What came of a row that has computed all tokens of its request."""
        return self._process_output(request, result.sampled_token_ids[row], result.logprobs.get(row))

    def _process_output(
        self, request: Request, token_ids: list[int], logprobs: list[TokenLogprobs] | None
    ) -> RequestUpdate:
        """Append sampled tokens until one ends the request; later ones are dropped."""
        for taken, token_id in enumerate(token_ids, start=1):
            request.append_output(token_id)
            self.repetition.check(request)
            if request.finish_reason is not None:
                self._finish(request)
                token_ids = token_ids[:taken]
                logprobs = logprobs[:taken] if logprobs is not None else None
                break
        prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
        return RequestUpdate(request, token_ids, logprobs, prompt_logprobs)

    def check_integrity(self) -> None:
        """Assert every invariant between requests, request slots and blocks. O(everything); for tests."""
        self.kv.check_integrity(self._requests.values())
        self.adapters.check_integrity(list(self._requests.values()))
        assert self.num_waiting + len(self._running) == len(self._requests)
        req_indices = [request.req_index for request in self._running.values()]
        assert sorted(req_indices + self._free_req_indices) == list(range(self._num_req_indices))
        for request in self._requests.values():
            running = request.status is RequestStatus.RUNNING
            assert running == (request.spec.request_id in self._running)
            assert running == (request.num_ready_tokens > 0), (
                f"{request} holds blocks while it waits, or none while it runs"
            )
            assert 0 <= request.num_computed_tokens <= request.num_tokens + request.num_in_flight
            assert request.num_output_tokens + request.num_in_flight <= request.max_tokens
            assert request.num_in_flight <= 1 or request.must_wait_for_output or not request.waits_for_output

    def find_leak(self) -> str:
        """What an engine without requests holds all the same, for the log; empty when nothing. O(1)."""
        leaks = {
            "request slots": self._num_req_indices - len(self._free_req_indices),
            "running requests": len(self._running),
            "waiting requests": self.num_waiting,
            "KV blocks": self.kv.pool.num_in_use,
        }
        return ", ".join(f"{count} {what}" for what, count in leaks.items() if count)

    def reset(self) -> None:
        """Take back what has leaked, in an engine without requests: it would be missing for as long as the engine runs."""
        leaked = set(range(self._num_req_indices)).difference(self._free_req_indices)
        self._released_req_indices += sorted(leaked.difference(self._released_req_indices))
        self._free_req_indices = _all_req_indices(self._num_req_indices)
        self._waiting = WaitingQueue(self.limits.policy)
        self._shares = TenantShares(self.limits.max_num_seqs, self.limits.max_model_len, self.kv, self._priority_key)
        self.adapters.forget_requests()
        self._composer = StepComposer(self.limits, self._shares)
        self._running.clear()
        self._entering.clear()
        self.kv.reset()


def _all_req_indices(count: int) -> list[int]:
    """The request slots, of which the last is given away first."""
    return list(range(count - 1, -1, -1))
