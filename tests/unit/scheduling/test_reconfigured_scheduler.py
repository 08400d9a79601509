"""Limits that change between two steps: what runs goes on, and the next plan keeps to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pagoda.engine.core.loop import EngineCore
from pagoda.engine.messages import EngineReady
from pagoda.errors import ConfigError, QueueFullError
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.plan import StepPlan, StepResult
from pagoda.scheduling.scheduler import Scheduler
from tests.support.requests import make_request

LIMITS = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=256, max_num_waiting=10)


def make() -> Scheduler:
    return Scheduler(LIMITS, KVCacheManager(65, 4, watermark=0.0))


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.apply(plan, StepResult(plan.step_id, [[1] if samples else [] for samples in plan.samples]))
    scheduler.check_integrity()
    return plan


def test_fewer_sequences_are_admitted_and_those_that_run_go_on() -> None:
    scheduler = make()
    for name in "abcdef":
        scheduler.add(make_request(name, 3, max_tokens=3))
    assert step(scheduler).request_ids == list("abcd")
    scheduler.configure(replace(LIMITS, max_num_seqs=2))
    assert step(scheduler).request_ids == list("abcd")
    step(scheduler)  # they end
    assert step(scheduler).request_ids == list("ef")
    for name in "ghi":
        scheduler.add(make_request(name, 3, max_tokens=1))
    assert len(step(scheduler).request_ids) == 2
    scheduler.configure(LIMITS)
    while (plan := scheduler.schedule()) is not None:
        scheduler.apply(plan, StepResult(plan.step_id, [[1] if samples else [] for samples in plan.samples]))
    assert not scheduler.has_work or scheduler.take_ended()
    assert scheduler.find_leak() == ""


def test_a_smaller_budget_and_chunk_and_queue_hold_from_the_next_plan_on() -> None:
    scheduler = make()
    scheduler.add(make_request("a", 60))
    assert step(scheduler).total_tokens == 32
    scheduler.configure(replace(LIMITS, max_num_batched_tokens=8, max_num_waiting=1))
    assert step(scheduler).total_tokens == 8
    scheduler.configure(replace(LIMITS, long_prefill_token_threshold=5, max_num_waiting=1))
    assert step(scheduler).total_tokens == 5
    for name in "bcde":  # three may run beside, one may wait
        scheduler.add(make_request(name, 3))
    with pytest.raises(QueueFullError):
        scheduler.add(make_request("f", 3))


class NoExecutor:
    max_concurrent_batches = 1


def make_core(**limits: Any) -> EngineCore:
    ready = EngineReady(
        max_model_len=256, max_num_seqs=4, max_num_batched_tokens=32, num_blocks=65, block_size=4, vocab_size=99
    )
    scheduler = Scheduler(replace(LIMITS, **limits), KVCacheManager(65, 4))
    return EngineCore(scheduler, NoExecutor(), ready)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "piece"),
    [
        ({"max_num_seqs": 5}, "max_num_seqs=5: must be at most 4"),
        ({"max_num_batched_tokens": 64}, "at most 32"),
        ({"max_num_waiting": 1, "max_num_batched_tokens": 3}, "at least max_num_seqs=4"),
        ({"num_speculative_tokens": 1}, "at most 0"),
    ],
)
def test_what_was_sized_at_start_bounds_a_change_and_nothing_of_it_is_done(changes: dict[str, int], piece: str) -> None:
    core = make_core()
    with pytest.raises(ConfigError, match=piece):
        core.reconfigure(changes)
    assert core._scheduler.limits == LIMITS


def test_auto_is_what_was_sized() -> None:
    core = make_core()
    core.reconfigure({"max_num_seqs": 2, "max_num_batched_tokens": 16})
    core.reconfigure({"max_num_seqs": None, "max_num_batched_tokens": None})
    assert core._scheduler.limits == LIMITS
