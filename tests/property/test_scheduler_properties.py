"""The scheduler under random arrivals, lengths, aborts, failures and cache sizes: every invariant after every step."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagoda.adapters import LoraAdapter
from pagoda.errors import InvalidRequestError, QueueFullError
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.kv_groups import FullGroup, StateGroup, WindowGroup
from pagoda.scheduling.lookahead import MultiStep, Speculation
from pagoda.scheduling.plan import StepPlan, StepResult
from pagoda.scheduling.request import Flow, Request
from pagoda.scheduling.sampled_tokens_update import SampledTokensTracker
from pagoda.scheduling.scheduler import RequestUpdate, Scheduler
from tests.support.drafts import ArbitraryDrafts
from tests.support.simulated_runner import SimulatedFirstStage, SimulatedRunner, simulated_token
from tests.support.virtual_time import Clock

EOS = 7

# Most prompts share a beginning, so that blocks are shared while they are written, evicted, and found again.
SHARED = [index % 3 for index in range(32)]
PROMPTS = st.one_of(
    st.builds(
        lambda shared, own: SHARED[:shared] + own,
        st.integers(0, 32),
        st.lists(st.integers(3, 4), min_size=0, max_size=3),
    ),
    st.lists(st.integers(0, 2), max_size=4),
)
# Some full blocks of the beginning, and room for an output.
SHARED_PROMPTS = st.integers(4, 20).map(lambda length: SHARED[:length])
OPTIONS = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 40),
        "min_tokens": st.sampled_from([0, 3]),
        "ignore_eos": st.booleans(),
        "priority": st.integers(0, 2),
        "salt": st.sampled_from([None, None, None, "a"]),
        "flow": st.sampled_from([*[("a", "")] * 3, ("a", "x"), ("b", ""), ("c", ""), ("c", "x")]),
        "weight": st.sampled_from([1.0, 1.0, 3.0]),
        "adapter": st.sampled_from([*[None] * 4, "a", "b", "c"]),
    }
)
GROUPS = (
    (FullGroup(),),
    (FullGroup(),),
    (WindowGroup(1),),
    (WindowGroup(3),),
    (FullGroup(), WindowGroup(3)),
    (FullGroup(), WindowGroup(1), WindowGroup(5)),
    (FullGroup(), FullGroup(), WindowGroup(2), WindowGroup(2)),
    (StateGroup(),),
    (FullGroup(), StateGroup()),
    (FullGroup(), StateGroup(), StateGroup()),
    (FullGroup(), WindowGroup(3), StateGroup()),
)
MAX_DRAFTS = 7
# Steps of others that may run before one with a request that runs, or with any of a tenant's.
MAX_STEPS_WITHOUT_REQUEST = 60
MAX_STEPS_WITHOUT_TENANT = 200


def undisturbed(prompt: list[int], max_tokens: int, ignore_eos: bool, min_tokens: int) -> list[int]:
    """The output of a request that has the engine to itself."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(simulated_token(tuple(tokens)))
        if tokens[-1] == EOS and not ignore_eos and len(tokens) - len(prompt) >= min_tokens:
            break
    return tokens[len(prompt) :]


def true_continuation(request: Request, count: int) -> list[int]:
    tokens = list(request.token_ids)
    for _ in range(count):
        tokens.append(simulated_token(tuple(tokens)))
    return tokens[request.num_tokens :]


class SchedulerMachine(RuleBasedStateMachine):
    """Plans are executed in order, up to `depth` of them in flight, as the engine's loop does."""

    @initialize(
        num_usable=st.integers(1, 24),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.sampled_from([1, 2, 3, 4, 5, 9]),
        budget=st.sampled_from([1, 3, 8, 64]),
        threshold=st.sampled_from([0, 2, None]),
        depth=st.integers(1, 3),
        policy=st.sampled_from(["fcfs", "priority"]),
        caching=st.booleans(),
        groups=st.deferred(lambda: st.sampled_from(GROUPS)),
        watermark=st.sampled_from([0.0, 0.2]),
        num_steps=st.sampled_from([1, 1, 4]),
        stages=st.sampled_from([1, 1, 2, 3]),
        drafts=st.one_of(st.none(), st.randoms(use_true_random=False)),
        tokens_of_a_step=st.sampled_from([0.0, 5.0, 1000.0]),
        loras=st.sampled_from([(1, 1), (1, 2), (2, 2)]),
    )
    def build(
        self,
        num_usable,
        block_size,
        max_num_seqs,
        budget,
        threshold,
        depth,
        policy,
        caching,
        groups,
        watermark,
        num_steps,
        stages,
        drafts,
        tokens_of_a_step,
        loras,
    ) -> None:
        self.groups = groups
        self.kv = KVCacheManager(
            num_usable + 1,
            block_size,
            groups=groups,
            max_step_tokens=budget + MAX_DRAFTS + num_steps,
            enable_prefix_caching=caching,
            watermark=watermark,
        )
        limits = SchedulerLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=30,
            max_num_waiting=6,
            long_prefill_token_threshold=threshold,
            max_preemptions=2,
            policy=policy,
            num_scheduler_steps=num_steps if stages == 1 else 1,
            pipeline_parallel_size=stages,
            max_loras=loras[0],
            max_cpu_loras=loras[1],
        )
        lookahead = None
        if drafts is not None and all(group.can_fall_back for group in groups):
            multi_step = MultiStep(limits, self.kv) if limits.num_scheduler_steps > 1 else None
            lookahead = Speculation(self.kv, ArbitraryDrafts(drafts, true_continuation), MAX_DRAFTS, multi_step)
        self.clock = Clock()
        self.tokens_of_a_step = tokens_of_a_step
        self.scheduler = Scheduler(limits, self.kv, self.clock, lookahead=lookahead)
        self.runner = SimulatedRunner(block_size, groups)
        self.depth = depth if stages == 1 else stages
        self.first_stage = SimulatedFirstStage()
        self.sampled_tokens = SampledTokensTracker()
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[int]] = {}
        self.ends: dict[str, FinishReason] = {}
        self.counter = 0
        self.steps_without: Counter[str] = Counter()  # by request and by tenant, those that could have run

    @rule(arrivals=st.lists(st.tuples(PROMPTS, OPTIONS), min_size=1, max_size=4))
    def arrive(self, arrivals) -> None:
        for prompt, options in arrivals:
            self._arrive(prompt, **options)

    def _arrive(self, prompt, max_tokens, min_tokens, ignore_eos, priority, salt, flow, weight, adapter) -> None:
        tenant, fairness_id = flow
        request = Request(
            EngineRequest(
                request_id=str(self.counter),
                prompt_token_ids=prompt,
                params=SamplingParams(min_tokens=min(min_tokens, max_tokens), ignore_eos=ignore_eos),
                max_tokens=max_tokens,
                eos_token_ids=(EOS,),
                priority=priority,
                cache_keys=() if salt is None else (salt,),
                tenant=tenant,
                tenant_weight=weight,
                fairness_id=fairness_id,
                adapter=None if adapter is None else LoraAdapter(adapter, "", "1"),
            )
        )
        self.counter += 1
        fits = 0 < len(prompt) < min(30, self.kv.max_tokens_of_a_request)
        waiting = self.scheduler._waiting
        aside = [request.flow.tenant for request in self.scheduler.adapters.parked]
        num_own = sum(waiting.num_of(flow) for flow in waiting.flows if flow.tenant == tenant) + aside.count(tenant)
        num_tenants = len({tenant, *aside, *(flow.tenant for flow in waiting.flows)})
        room = self.scheduler.num_waiting + self.scheduler.num_running < 6 + self.scheduler.limits.max_num_seqs
        room |= num_own < 6 // num_tenants
        try:
            self.scheduler.add(request)
        except (InvalidRequestError, QueueFullError) as error:
            assert not (fits and room), error  # noqa: PT017 - a refusal is one of two right outcomes
            return
        assert fits
        assert room
        self.requests[request.spec.request_id] = request
        self.outputs[request.spec.request_id] = []

    @rule()
    def step(self) -> None:
        while len(self.in_flight) < self.depth:
            could_run = {
                request.spec.request_id for request in self.scheduler._running.values() if request.next_tokens()
            }
            if (plan := self._schedule()) is None:
                break
            assert sum(plan.num_scheduled_tokens) <= self.scheduler.limits.max_num_batched_tokens
            self._check_turns(plan, could_run)
            self.in_flight.append((plan, self._execute(plan)))
        had_work = bool(self.in_flight)
        if had_work:
            self._apply(*self.in_flight.popleft())
        self._record(self.scheduler.take_ended())
        assert had_work or not self.scheduler.has_work, "requests wait, and nothing can run"

    def _schedule(self) -> StepPlan | None:
        """The next plan; adapters that it waits for are there at once."""
        gate = self.scheduler.adapters
        while (plan := self.scheduler.schedule()) is None and gate.is_loading:
            self._load_adapters()
        self._load_adapters()
        return plan

    def _load_adapters(self) -> None:
        gate = self.scheduler.adapters
        gate.take_unloads()
        for _, adapter in gate.take_loads():
            gate.loaded(adapter)

    def _check_turns(self, plan: StepPlan, could_run: set[str]) -> None:
        """Nobody waits for ever, and nothing is left idle; `could_run`: those that could before the plan was made."""
        running = self.scheduler._running.values()
        names = {request.spec.request_id for request in running if request.next_tokens()}
        names |= self.scheduler._shares.tenants.keys()
        ran = set(plan.request_ids) | {self.requests[name].flow for name in plan.request_ids}
        self.steps_without = Counter({name: self.steps_without[name] + 1 for name in names - ran})
        # A request may have all tokens of others before it, one by one where the budget is one token.
        num_tokens = sum(request.num_prompt_tokens + request.max_tokens for request in self.requests.values())
        most = MAX_STEPS_WITHOUT_REQUEST + num_tokens // self.scheduler._budget.tokens
        for name, count in self.steps_without.items():
            assert count <= (MAX_STEPS_WITHOUT_TENANT if isinstance(name, Flow) else most), f"{name} waits"
        if len(self.scheduler._shares.tenants) == 1:
            self._check_lone_tenant(plan, could_run)

    def _check_lone_tenant(self, plan: StepPlan, could_run: set[str]) -> None:
        """All its rows that decode run, where the budget has a token for each, and it has every request slot."""
        scheduler = self.scheduler
        budget = scheduler._budget.tokens
        if scheduler.limits.pipeline_parallel_size == 1 and budget >= scheduler.num_running:
            can_run = {
                request.spec.request_id
                for request in scheduler._running.values()
                if request not in scheduler._composer.prompts and request.next_tokens()
            }
            assert can_run & could_run <= set(plan.request_ids)

    def _execute(self, plan: StepPlan, failed_row: int | None = None) -> StepResult:
        """Run a plan. With stages, the first one must know every token of it: none may still be on the way."""
        self.clock.advance(self.tokens_of_a_step + plan.total_tokens)
        if self.scheduler.limits.pipeline_parallel_size == 1:
            return self.runner.execute(plan, failed_row)
        on_the_way = {
            request.spec.request_id
            for earlier, _ in self.in_flight
            for row, request in self.scheduler._in_flight[earlier.step_id].rows()  # others' tokens will not be taken
            if earlier.samples[row]
        }
        assert not on_the_way & set(plan.request_ids)
        inputs = self._inputs_of_first_stage(plan)
        result = self.runner.execute(plan, failed_row)
        rows = zip(plan.req_indices, plan.num_computed_tokens, inputs, strict=True)
        for row, (req_index, computed, tokens) in enumerate(rows):
            if req_index not in self.runner.failed_slots:
                drafts = plan.draft_token_ids.get(row, [])
                known = tokens[: len(tokens) - len(drafts)]
                assert known == self.runner.token_pool[req_index][computed : computed + len(known)]
                assert tokens == known + drafts
        return result

    def _inputs_of_first_stage(self, plan: StepPlan) -> list[list[int | None]]:
        return self.first_stage.inputs(plan, self.sampled_tokens.update_for(plan))

    def _apply(self, plan: StepPlan, result: StepResult) -> None:
        if self.scheduler.limits.pipeline_parallel_size > 1:
            self.sampled_tokens.record(result)
        self._record(self.scheduler.apply(plan, result))

    @rule(count=st.integers(5, 40))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @rule(index=st.integers(0, 1000))
    def abort(self, index: int) -> None:
        request_id = str(index % max(1, self.counter))
        ended_before = request_id in self.ends
        self.scheduler.abort([request_id])
        self._record(self.scheduler.take_ended())
        if request_id in self.requests and not ended_before:
            assert self.ends[request_id] is FinishReason.ABORT

    @precondition(lambda self: hasattr(self, "depth") and len(self.in_flight) < self.depth)
    @rule(index=st.integers(0, 4), prompt=SHARED_PROMPTS, options=OPTIONS, count=st.sampled_from([0, 2, 3]))
    def a_row_does_not_run(self, index: int, prompt, options, count: int) -> None:
        """It writes no KV, which the scheduler learns with the result; requests with the same prompt come with it.

        A row of a request that enters, where there is one.
        """
        self.arrive([(prompt, options)] * count)
        plan = self._schedule()
        if plan is not None:
            entering = {new.req_index for new in plan.new_requests}
            rows = [row for row, req_index in enumerate(plan.req_indices) if req_index in entering] or range(
                len(plan.req_indices)
            )
            self.in_flight.append((plan, self._execute(plan, failed_row=rows[index % len(rows)])))

    @precondition(lambda self: self.in_flight)
    @rule()
    def a_row_fails_that_ran(self) -> None:
        plan, result = self.in_flight.popleft()
        result.errors[0] = "row fault"
        self._apply(plan, result)
        self._record(self.scheduler.take_ended())

    @rule()
    def a_step_fails(self) -> None:
        # Nothing that the failed step should have written may be trusted: overwrite all of it.
        plan = self._schedule()
        if plan is not None:
            self._execute(plan)
            rows = zip(plan.req_indices, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True)
            for req_index, computed, scheduled in rows:
                self.runner.invalidate(req_index, computed, scheduled)
        self.in_flight.clear()
        self.scheduler.fail_in_flight("step fault")
        self._record(self.scheduler.take_ended())

    @rule()
    def a_step_does_not_fit(self) -> None:
        plan = self._schedule()
        if plan is not None:
            if self.scheduler.limits.pipeline_parallel_size > 1:
                self._inputs_of_first_stage(plan)
            self.runner.enter_only(plan)
        self.in_flight.clear()
        if not self.scheduler.retry_in_flight():
            self.scheduler.fail_in_flight("out of memory")
        self._record(self.scheduler.take_ended())

    @invariant()
    def everything_is_accounted_for(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            for request in self.scheduler._running.values():
                self._check_blocks(request)

    def _check_blocks(self, request: Request) -> None:
        """No group holds more than its rule needs, whatever came before, and all together no more than was said."""
        size, step_tokens = self.kv.block_size, self.kv.max_step_tokens
        for group, lease in zip(self.groups, request.leases, strict=True):
            assert all(block.block_id == 0 for block in lease.blocks[: lease.num_dropped])
            assert 0 not in {block.block_id for block in lease.blocks[lease.num_dropped :]}
            assert (len(lease.blocks) - 1) * size < 30
            if isinstance(group, WindowGroup):
                assert lease.num_held <= (step_tokens + group.size - 2) // size + 2
        assert request.num_blocks <= max(
            self.kv.most_blocks(request.num_tokens), self.kv.most_blocks(request.num_prompt_tokens + request.max_tokens)
        )

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.scheduler.has_work and not self.in_flight:
                break
            self.step()
        assert set(self.ends) == set(self.requests), "a request never ended"
        assert not self.scheduler.find_leak()
        assert self.kv.pool.num_free + self.kv.pool.num_cached == self.kv.pool.num_usable

    def _record(self, updates: list[RequestUpdate]) -> None:
        for update in updates:
            request_id = update.request.spec.request_id
            assert request_id not in self.ends, "an update of a request that had ended"
            self.outputs[request_id] += update.new_token_ids
            if update.request.finish_reason is not None:
                self.ends[request_id] = update.request.finish_reason
            self._check_output(update.request)

    def _check_output(self, request: Request) -> None:
        prompt = request.token_ids[: request.num_prompt_tokens]
        params = request.spec.params
        expected = undisturbed(prompt, request.max_tokens, params.ignore_eos, params.min_tokens)
        output = self.outputs[request.spec.request_id]
        assert output == expected[: len(output)]
        reason = self.ends.get(request.spec.request_id)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert output == expected
            assert (reason is FinishReason.STOP) == (
                output[-1] == EOS and not params.ignore_eos and len(output) >= params.min_tokens
            )


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=250, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestSchedulerLong(SchedulerMachine.TestCase):
    settings = settings(
        max_examples=5000, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
    )
