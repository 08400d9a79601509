"""Prompts that are computed whole: each in one step, in turn, within the budget."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st

from pagoda.errors import ErrorKind, InvalidRequestError
from pagoda.pooling.output import PooledOutput
from pagoda.pooling.params import PoolingParams
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.plan import StepPlan, StepResult
from pagoda.scheduling.pooling_scheduler import EncoderScheduler
from pagoda.scheduling.request import Request

OUTPUT = PooledOutput.of([1.0])


def make_scheduler(*, budget: int = 64, slots: int = 4, longest: int = 64) -> EncoderScheduler:
    limits = SchedulerLimits(
        max_num_seqs=slots, max_num_batched_tokens=budget, max_model_len=longest, max_num_waiting=1000
    )
    return EncoderScheduler(limits, KVCacheManager(2, 16, groups=(), enable_prefix_caching=False))


def make_request(name: str, length: int, *, tenant: str = "", priority: int = 0) -> Request:
    return Request(
        EngineRequest(
            request_id=name,
            params=PoolingParams(),
            prompt_token_ids=[1] * length,
            max_tokens=1,
            tenant=tenant,
            priority=priority,
        )
    )


def result_of(plan: StepPlan) -> StepResult:
    rows = range(len(plan.req_indices))
    return StepResult(plan.step_id, [[] for _ in rows], pooled={row: OUTPUT for row in rows if plan.samples[row]})


def test_a_prompt_may_be_as_long_as_the_model_takes() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 64))
    with pytest.raises(InvalidRequestError, match="at most 64"):
        scheduler.add(make_request("b", 65))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.num_scheduled_tokens == [64]
    (update,) = scheduler.apply(plan, result_of(plan))
    assert update.pooled == OUTPUT
    assert update.request.finish_reason is FinishReason.STOP
    assert not scheduler.has_work


def test_what_does_not_fit_waits_and_nothing_is_cut() -> None:
    scheduler = make_scheduler()
    for name, length in (("a", 40), ("b", 30), ("c", 10)):
        scheduler.add(make_request(name, length))
    first = scheduler.schedule()
    assert first is not None
    assert first.request_ids == ["a"], "the next in turn is not overtaken"
    scheduler.apply(first, result_of(first))
    second = scheduler.schedule()
    assert second is not None
    assert second.request_ids == ["b", "c"]


def test_a_prompt_longer_than_the_budget_after_out_of_memory_runs_alone() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 60))
    scheduler.add(make_request("b", 4))
    plan = scheduler.schedule()
    assert plan is not None
    assert scheduler.retry_in_flight()
    again = scheduler.schedule()
    assert again is not None
    assert again.num_scheduled_tokens == [60]


def test_a_row_without_an_output_fails_by_itself() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3))
    scheduler.add(make_request("b", 3))
    plan = scheduler.schedule()
    assert plan is not None
    outcome = result_of(plan)
    del outcome.pooled[0]
    first, second = scheduler.apply(plan, outcome)
    assert first.request.error_kind is ErrorKind.INTERNAL
    assert second.pooled == OUTPUT
    scheduler.check_integrity()


@hypothesis.given(st.data())
def test_every_request_ends_once_whole_and_within_the_budget(data: st.DataObject) -> None:
    budget, slots = data.draw(st.integers(16, 80)), data.draw(st.integers(1, 5))
    scheduler = make_scheduler(budget=budget, slots=slots, longest=16)
    lengths: dict[str, int] = {}
    ended: dict[str, FinishReason | None] = {}
    for number in range(data.draw(st.integers(1, 25))):
        name = f"r{number}"
        lengths[name] = data.draw(st.integers(1, 16))
        scheduler.add(make_request(name, lengths[name], tenant=data.draw(st.sampled_from(["", "x", "y"]))))
        if data.draw(st.booleans()):
            scheduler.abort([data.draw(st.sampled_from(sorted(lengths)))])
        plan = scheduler.schedule()
        updates = scheduler.take_ended()
        if plan is not None:
            assert sum(plan.num_scheduled_tokens) <= budget
            assert len(plan.req_indices) <= slots
            for request_id, count in zip(plan.request_ids, plan.num_scheduled_tokens, strict=True):
                assert count == lengths[request_id]
            updates += scheduler.apply(plan, result_of(plan))
        for update in updates:
            assert update.request.spec.request_id not in ended
            ended[update.request.spec.request_id] = update.request.finish_reason
        scheduler.check_integrity()
    while (plan := scheduler.schedule()) is not None:
        for update in scheduler.apply(plan, result_of(plan)):
            ended[update.request.spec.request_id] = update.request.finish_reason
    ended |= {update.request.spec.request_id: update.request.finish_reason for update in scheduler.take_ended()}
    assert ended.keys() == lengths.keys()
    assert scheduler.find_leak() == ""
