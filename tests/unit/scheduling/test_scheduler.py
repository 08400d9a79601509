"""What the scheduler decides, one situation at a time. The random ones are in tests/property/."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pagoda.errors import InvalidRequestError, QueueFullError
from pagoda.sampling.output import FinishReason, TokenLogprobs
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.block_pool import BlockLease
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.kv_groups import WindowGroup
from pagoda.scheduling.plan import SampledTokensUpdate, StepPlan, StepResult
from pagoda.scheduling.request import Flow, Request
from pagoda.scheduling.sampled_tokens_update import SampledTokensTracker
from pagoda.scheduling.scheduler import RequestUpdate, Scheduler
from tests.support.requests import make_request
from tests.support.virtual_time import Clock


def make_scheduler(
    num_usable: int = 64,
    block_size: int = 4,
    watermark: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
    **limits,
) -> Scheduler:
    values = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256, "max_num_waiting": 100} | limits
    kv = KVCacheManager(num_usable + 1, block_size, watermark=watermark)
    return Scheduler(SchedulerLimits(**values), kv, clock)


def finish(scheduler: Scheduler, plan: StepPlan, token_id: int = 1) -> list[RequestUpdate]:
    return scheduler.apply(plan, StepResult(plan.step_id, [[token_id] if samples else [] for samples in plan.samples]))


def step(scheduler: Scheduler, token_id: int = 1) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    finish(scheduler, plan, token_id)
    scheduler.check_integrity()
    return plan


def scheduled(plan: StepPlan) -> dict[str, int]:
    return dict(zip(plan.request_ids, plan.num_scheduled_tokens, strict=True))


def test_long_prompt_runs_in_chunks_and_samples_only_at_its_end() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=5)
    scheduler.add(make_request("a", 12))
    plans = [step(scheduler) for _ in range(4)]
    assert [plan.num_scheduled_tokens for plan in plans] == [[5], [5], [2], [1]]
    assert [plan.samples for plan in plans] == [[False], [False], [True], [True]]


def test_decoding_requests_keep_running_beside_a_long_prompt() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    scheduler.add(make_request("a", 3))
    step(scheduler)
    scheduler.add(make_request("b", 20))
    assert scheduled(step(scheduler)) == {"a": 1, "b": 5}
    assert scheduled(step(scheduler)) == {"a": 1, "b": 5}


def test_threshold_keeps_one_prompt_from_taking_the_whole_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10, long_prefill_token_threshold=4)
    scheduler.add(make_request("a", 20))
    scheduler.add(make_request("b", 20))
    assert scheduled(step(scheduler)) == {"a": 4, "b": 4}


def test_equal_prompts_that_arrive_together_share_blocks_in_the_same_step() -> None:
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add(make_request(name, 10, first=5))
    plan = scheduler.schedule()
    assert plan is not None
    assert scheduled(plan) == {"a": 10, "b": 2}
    assert plan.new_requests[1].block_ids[0][:2] == plan.new_requests[0].block_ids[0][:2]


def test_a_cached_prompt_still_computes_its_last_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 8, first=5, max_tokens=1))
    step(scheduler)
    repeated = make_request("b", 8, first=5, max_tokens=1)
    scheduler.add(repeated)
    assert scheduled(step(scheduler)) == {"b": 4}
    assert repeated.num_cached_tokens == 4


def test_tenants_with_different_salts_share_nothing() -> None:
    scheduler = make_scheduler()
    for name in ("a", "b"):
        scheduler.add(make_request(name, 10, first=5, cache_keys=(name,)))
    assert scheduled(step(scheduler)) == {"a": 10, "b": 10}


def test_newest_request_is_preempted_and_returns_before_those_that_never_ran() -> None:
    scheduler = make_scheduler(num_usable=4, max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_request(name, 8, max_tokens=5))
    step(scheduler)  # a and b take two blocks each
    plan = step(scheduler)  # a needs a third: b gives way, and nobody is admitted in this step
    assert scheduled(plan) == {"a": 1}
    assert scheduler.num_preemptions == 1
    order = [new.spec.request_id for _ in range(30) if scheduler.has_work for new in step(scheduler).new_requests]
    assert order == ["b", "c"]


def test_victim_that_was_planned_already_leaves_the_plan_and_returns_its_budget() -> None:
    # The second in the running order has the better standing, and is the one that runs out of blocks.
    low_first = make_scheduler(num_usable=4, policy="priority")
    low_first.add(make_request("low", 7, priority=5))
    step(low_first)
    low_first.add(make_request("high", 8, priority=0))
    plan = step(low_first)
    assert scheduled(plan) == {"low": 1, "high": 8}
    plan = step(low_first)
    assert scheduled(plan) == {"high": 1}
    assert low_first.num_preemptions == 1


def test_request_preempted_often_is_spared_while_others_can_give_way() -> None:
    scheduler = make_scheduler(num_usable=4, max_preemptions=1)
    old, new = make_request("old", 8), make_request("new", 8)
    scheduler.add(old)
    scheduler.add(new)
    new.num_preemptions = 1
    step(scheduler)
    assert scheduled(step(scheduler)) == {"new": 1}
    assert old.num_preemptions == 1


def test_watermark_holds_back_admission_only_while_others_run() -> None:
    scheduler = make_scheduler(num_usable=10, watermark=0.3)
    scheduler.add(make_request("a", 30, max_tokens=1))
    scheduler.add(make_request("b", 4))
    assert scheduled(step(scheduler)) == {"a": 30}  # 8 of 10 blocks, though 3 are to be left: it is alone
    assert scheduled(step(scheduler)) == {"b": 4}


def test_length_is_capped_by_the_model_and_by_the_whole_cache() -> None:
    scheduler = make_scheduler(num_usable=3, block_size=4, max_model_len=10)
    by_model = make_request("a", 4, max_tokens=100)
    scheduler.add(by_model)
    assert by_model.max_tokens == 6
    scheduler = make_scheduler(num_usable=3, block_size=4)
    by_cache = make_request("b", 4, max_tokens=100)
    scheduler.add(by_cache)
    for _ in range(9):
        step(scheduler)
    assert by_cache.finish_reason is FinishReason.LENGTH
    assert by_cache.num_tokens == 13  # twelve in the cache, and a last one that needs no KV
    assert not scheduler.has_work


def test_length_cap_beats_min_tokens_and_stop_beats_length_at_the_same_token() -> None:
    scheduler = make_scheduler()
    capped = make_request("a", 4, max_tokens=2, params=SamplingParams(min_tokens=50), eos_token_ids=(1,))
    stopped = make_request("b", 4, max_tokens=1, params=SamplingParams(stop_token_ids=(1,)))
    scheduler.add(capped)
    scheduler.add(stopped)
    step(scheduler)
    step(scheduler)
    assert capped.finish_reason is FinishReason.LENGTH
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.stop_reason == 1


def test_end_of_sequence_gives_no_stop_reason_and_can_be_ignored() -> None:
    scheduler = make_scheduler()
    ends = make_request("a", params=SamplingParams(), eos_token_ids=(1,))
    goes_on = make_request("b", params=SamplingParams(ignore_eos=True), eos_token_ids=(1,))
    scheduler.add(ends)
    scheduler.add(goes_on)
    step(scheduler)
    assert (ends.finish_reason, ends.stop_reason) == (FinishReason.STOP, None)
    assert goes_on.finish_reason is None


@pytest.mark.parametrize("num_tokens", [0, 12, 500])
def test_prompt_that_can_never_fit_is_refused_at_once(num_tokens: int) -> None:
    scheduler = make_scheduler(num_usable=3, block_size=4, max_model_len=12)
    with pytest.raises(InvalidRequestError):
        scheduler.add(make_request("a", num_tokens))
    assert not scheduler.has_work


def test_waiting_queue_is_bounded_and_aborted_requests_make_room() -> None:
    scheduler = make_scheduler(max_num_seqs=1, max_num_waiting=1)
    scheduler.add(make_request("a"))
    scheduler.add(make_request("b"))
    with pytest.raises(QueueFullError):
        scheduler.add(make_request("c"))
    scheduler.abort(["a", "unknown"])
    scheduler.add(make_request("d"))
    assert [item.request.finish_reason for item in scheduler.take_ended()] == [FinishReason.ABORT]


def test_sending_and_aborting_for_ever_does_not_grow_the_queue() -> None:
    scheduler = make_scheduler(max_num_seqs=1, max_num_waiting=5)
    scheduler.add(make_request("head"))
    step(scheduler)
    scheduler.add(make_request("next"))
    for index in range(2000):
        scheduler.add(make_request(f"r{index}"))
        scheduler.abort([f"r{index}"])
    assert len(scheduler._waiting._queues[Flow("", "")]._entries) < 200  # type: ignore[attr-defined]
    assert scheduler.num_waiting == 1


def test_result_of_a_request_aborted_in_flight_is_dropped() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.abort(["a"])
    assert finish(scheduler, plan) == []
    assert [item.request.spec.request_id for item in scheduler.take_ended()] == ["a"]
    assert not scheduler.find_leak()


@pytest.mark.parametrize("is_aborted", [False, True])
def test_request_admitted_with_blocks_of_a_row_that_failed_is_computed_again(is_aborted: bool) -> None:
    """In the same step, when the client of the failed request has left before its result."""
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add(make_request(name, 10, first=5))
    plan = scheduler.schedule()
    assert plan is not None
    assert scheduled(plan) == {"a": 10, "b": 2}
    if is_aborted:
        scheduler.abort(["a"])
    assert scheduler.apply(plan, StepResult(plan.step_id, [[], [1]], errors={0: "it did not run"})) == []
    (ended,) = scheduler.take_ended()
    assert (ended.request.spec.request_id, ended.request.error) == ("a", None if is_aborted else "it did not run")
    assert scheduled(step(scheduler)) == {"b": 10}


def test_what_is_in_flight_of_a_request_with_blocks_of_a_row_that_failed_is_not_taken() -> None:
    scheduler = make_scheduler(num_usable=7)
    scheduler.add(make_request("a", 10, first=5))
    first = scheduler.schedule()
    scheduler.add(make_request("b", 16, first=5))
    scheduler.add(make_request("c", 3))
    second, third = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    assert third is not None
    assert scheduled(second) == {"a": 1, "b": 8, "c": 3}
    assert "b" in scheduled(third)
    scheduler.apply(first, StepResult(first.step_id, [[]], errors={0: "it did not run"}))
    (failed,) = scheduler.take_ended()
    assert failed.request.spec.request_id == "a"
    for plan in (second, third):
        result = StepResult(
            plan.step_id, [[index] for index in range(len(plan.req_indices))], errors={0: "it did not run"}
        )
        assert [update.request.spec.request_id for update in scheduler.apply(plan, result)] == ["c"]
    assert scheduler.take_ended() == []
    assert scheduled(step(scheduler)) == {"b": 16, "c": 1}


def test_who_was_admitted_with_blocks_of_a_row_that_failed_and_had_no_row_yet_is_computed_again() -> None:
    """Another tenant is admitted at once, and has its turn in a later step."""
    scheduler = make_scheduler(block_size=1, max_num_batched_tokens=1)
    scheduler.add(make_request("a", 6, first=5, tenant="a"))
    first = scheduler.schedule()
    scheduler.add(make_request("b", 6, first=5, tenant="b"))
    second = scheduler.schedule()
    assert first is not None
    assert second is not None
    assert scheduled(second) == {"a": 1}
    assert scheduler._requests["b"].num_shared_blocks == 1
    scheduler.apply(first, StepResult(first.step_id, [[]], errors={0: "it did not run"}))
    finish(scheduler, second)
    plan = step(scheduler)
    assert (scheduled(plan), plan.num_computed_tokens) == ({"b": 1}, [0])


def test_leaked_request_slots_and_blocks_are_found_when_idle_and_can_be_used_again_after_a_reset() -> None:
    scheduler = make_scheduler(num_usable=4, max_num_seqs=2)
    request = make_request("a", 8, max_tokens=1)
    scheduler.add(request)
    leaked = BlockLease(scheduler.kv.pool)
    plan = scheduler.schedule()
    assert plan is not None
    leaked.adopt(request.leases[0].blocks)
    finish(scheduler, plan)
    req_index = scheduler._free_req_indices.pop()
    assert scheduler.find_leak() == "1 request slots, 2 KV blocks"
    scheduler.reset()
    assert scheduler.find_leak() == ""
    for name in "bc":
        scheduler.add(make_request(name, 8, max_tokens=1))
    plan = step(scheduler)
    assert scheduled(plan) == {"b": 8, "c": 8}
    assert plan.released_req_indices.count(req_index) == 1
    leaked.release()  # into the pool of before
    scheduler.check_integrity()


def test_plan_names_only_what_changed() -> None:
    scheduler = make_scheduler(block_size=4)
    scheduler.add(make_request("a", 3))
    first, second, third = step(scheduler), step(scheduler), step(scheduler)
    assert len(first.new_requests) == 1
    assert not first.new_blocks
    assert not second.new_blocks  # the fourth token still fits the first block
    assert not second.new_requests
    (new,) = third.new_blocks
    assert (new.req_index, new.group, new.offset, len(new.block_ids)) == (third.req_indices[0], 0, 1, 1)


def test_prompt_logprobs_come_once_even_when_the_prompt_is_computed_twice() -> None:
    scheduler = make_scheduler(num_usable=5, max_num_batched_tokens=16)
    wanted = make_request("b", 8, params=SamplingParams(prompt_logprobs=0, ignore_eos=True))
    scheduler.add(make_request("a", 8))
    scheduler.add(wanted)
    seen = []
    for _ in range(40):
        plan = scheduler.schedule()
        if plan is None:
            break
        result = StepResult(plan.step_id, [[1] if samples else [] for samples in plan.samples])
        for row, name in enumerate(plan.request_ids):
            if name == "b":
                computed, count = plan.num_computed_tokens[row], plan.num_scheduled_tokens[row]
                positions = range(computed + 1, min(computed + count + 1, 8))
                result.prompt_logprobs[row] = [TokenLogprobs([position], [0.0], 1) for position in positions]
        seen += [item.prompt_logprobs for item in scheduler.apply(plan, result) if item.prompt_logprobs is not None]
    assert wanted.num_preemptions > 0
    assert len(seen) == 1
    assert [entry and entry.token_ids[0] for entry in seen[0]] == [None, 1, 2, 3, 4, 5, 6, 7]


def test_tenants_take_turns_and_keep_their_own_order() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        scheduler.add(make_request(name, max_tokens=1, tenant=name[0]))
    assert [step(scheduler).request_ids[0] for _ in range(6)] == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_several_steps_run_on_one_plan_and_end_at_the_length_cap() -> None:
    scheduler = make_scheduler(num_scheduler_steps=4)
    request = make_request("a", 4, max_tokens=7)
    scheduler.add(request)
    assert step(scheduler).num_steps == []  # the prompt
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.num_steps == [4]
    scheduler.apply(plan, StepResult(plan.step_id, [[1, 2, 3, 4]]))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.num_steps == [2]
    scheduler.apply(plan, StepResult(plan.step_id, [[5, 6]]))
    assert (request.num_output_tokens, request.finish_reason) == (7, FinishReason.LENGTH)
    assert not scheduler.find_leak()


def test_tokens_sampled_past_a_stop_in_a_multi_step_plan_are_dropped() -> None:
    scheduler = make_scheduler(num_scheduler_steps=4)
    scheduler.add(make_request("a", params=SamplingParams(stop_token_ids=(9,)), max_tokens=20))
    step(scheduler)
    plan = scheduler.schedule()
    assert plan is not None
    (update,) = scheduler.apply(plan, StepResult(plan.step_id, [[1, 9, 3, 4]]))
    assert (update.new_token_ids, update.request.finish_reason) == ([1, 9], FinishReason.STOP)
    assert not scheduler.find_leak()


def test_a_step_that_does_not_fit_is_planned_again_under_half_the_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    request = make_request("a", 30)
    scheduler.add(request)
    step(scheduler)
    assert scheduler.schedule() is not None
    assert scheduler.retry_in_flight()
    assert [step(scheduler).num_scheduled_tokens[0] for _ in range(4)] == [8, 8, 8, 6]
    assert request.finish_reason is None
    assert request.num_output_tokens == 1


@pytest.mark.parametrize("num_stages", [1, 2])
def test_all_running_requests_go_on_when_the_budget_has_become_smaller_than_their_number(num_stages: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, pipeline_parallel_size=num_stages)
    names = "abcdefgh"
    for name in names:
        scheduler.add(make_request(name, 1, max_tokens=100))
    step(scheduler)
    for _ in range(2):  # as after two steps, of other requests, that ran out of memory
        assert scheduler._budget.shrink()
    in_flight: list[StepPlan] = []
    last_seen = dict.fromkeys(names, 0)
    for turn in range(1, 40):
        while len(in_flight) < num_stages and (plan := scheduler.schedule()) is not None:
            in_flight.append(plan)
        plan = in_flight.pop(0)
        assert plan.total_tokens <= 2
        last_seen.update(dict.fromkeys(plan.request_ids, turn))
        finish(scheduler, plan)
    assert scheduler.num_running == 8
    assert min(last_seen.values()) > 40 - 12


def test_repetition_is_stopped_where_it_is_asked_for() -> None:
    def run(mode: str) -> Request:
        scheduler = make_scheduler(
            repetition_detection=mode,
            repetition_min_tokens=40,
            repetition_max_period=5,
            max_model_len=300,
            num_usable=100,
        )
        request = make_request("a", 4, max_tokens=200)
        scheduler.add(request)
        for index in range(200):
            if not scheduler.has_work:
                break
            step(scheduler, token_id=1 + index % 3 if index >= 20 else 50 + index)
        return request

    assert run("stop").finish_reason is FinishReason.REPETITION
    assert run("stop").num_output_tokens == 64  # 20 varied ones, 40 that repeat, and up to the next look
    assert run("warn").finish_reason is FinishReason.LENGTH
    assert run("off").finish_reason is FinishReason.LENGTH


def test_time_limit_ends_a_request_with_what_it_has() -> None:
    clock = Clock()
    scheduler = make_scheduler(max_request_seconds=1000.0, clock=clock)
    old, new = make_request("old", arrival_time=clock()), make_request("new", arrival_time=clock() + 500.0)
    scheduler.add(old)
    scheduler.add(new)
    clock.advance(999.0)
    assert step(scheduler).request_ids == ["old", "new"]
    clock.advance(1.0)
    assert step(scheduler).request_ids == ["new"]
    assert (old.num_output_tokens, old.finish_reason, old.stop_reason) == (
        1,
        FinishReason.LENGTH,
        "max_request_seconds",
    )


def test_windowed_prefix_hits_without_the_blocks_that_have_left_the_window() -> None:
    kv = KVCacheManager(20, 4, groups=[WindowGroup(6)])
    scheduler = Scheduler(
        SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, max_num_waiting=10), kv
    )
    scheduler.add(make_request("a", 24, first=5, max_tokens=3))
    for _ in range(3):
        step(scheduler)
    scheduler.add(
        make_request("other", 56, max_tokens=1)
    )  # takes the oldest free blocks: the beginning of the first prompt
    step(scheduler)
    again = make_request("b", 24, first=5, max_tokens=3)
    scheduler.add(again)
    plan = step(scheduler)
    assert scheduled(plan) == {"b": 4}
    assert again.num_cached_tokens == 20
    assert plan.new_requests[0].block_ids[0][:3] == [0, 0, 0]


def test_stages_of_a_pipeline_all_have_requests_to_decode() -> None:
    scheduler = make_scheduler(pipeline_parallel_size=3)
    for name in "abcdefg":
        scheduler.add(make_request(name))
    step(scheduler)  # all prompts at once
    first, second, third = (scheduler.schedule() for _ in range(3))
    assert [plan.request_ids for plan in (first, second, third)] == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert scheduler.schedule() is None, "every request waits for a token"
    finish(scheduler, first)
    assert scheduler.schedule().request_ids == ["a", "b", "c"]
    scheduler.check_integrity()


def test_chunks_of_a_prompt_follow_each_other_through_the_pipeline() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=5, pipeline_parallel_size=2)
    scheduler.add(make_request("a", 12))
    plans = [scheduler.schedule() for _ in range(3)]
    assert [plan.num_scheduled_tokens for plan in plans] == [[5], [5], [2]]
    assert scheduler.schedule() is None, "the first sampled token is not there yet"


def test_request_left_out_of_a_full_batch_is_in_the_next() -> None:
    scheduler = make_scheduler(pipeline_parallel_size=2)
    for name in "abcd":
        scheduler.add(make_request(name, max_tokens=50))
    step(scheduler)
    in_flight = [scheduler.schedule(), scheduler.schedule()]
    scheduler.add(make_request("e", max_tokens=50))
    last_seen = dict.fromkeys("abcde", 0)
    for turn in range(1, 20):
        finish(scheduler, in_flight.pop(0))
        in_flight.append(scheduler.schedule())
        last_seen.update(dict.fromkeys(in_flight[-1].request_ids, turn))
        assert min(last_seen.values()) >= turn - 3


def test_where_a_whole_share_gives_way_the_other_share_runs() -> None:
    scheduler = make_scheduler(
        num_usable=6, block_size=2, max_num_batched_tokens=3, pipeline_parallel_size=2, max_preemptions=2
    )
    scheduler.add(make_request("a", 2, first=1, max_tokens=10))
    scheduler.add(make_request("b", 2, first=1, max_tokens=9))
    in_flight: list[StepPlan] = []
    while scheduler.has_work:
        while len(in_flight) < 2 and (plan := scheduler.schedule()) is not None:
            in_flight.append(plan)
        # "b" was preempted twice and is spared: "a", which is the whole share, gives way to itself.
        assert in_flight, "requests wait, and nothing runs"
        finish(scheduler, in_flight.pop(0))
    assert scheduler.num_preemptions >= 3


def test_sampled_token_of_a_request_slot_that_was_released_meanwhile_is_dropped() -> None:
    scheduler, tracker = make_scheduler(pipeline_parallel_size=2), SampledTokensTracker()
    for name in "ab":
        scheduler.add(make_request(name))
    first = scheduler.schedule()
    assert tracker.update_for(first) == SampledTokensUpdate()
    scheduler.abort(["a"])
    scheduler.add(make_request("c"))
    second = scheduler.schedule()
    assert tracker.update_for(second) == SampledTokensUpdate()
    assert second.new_requests[0].req_index == first.req_indices[0], "the newcomer was meant to take the request slot"
    result = StepResult(first.step_id, [[41], [42]])
    tracker.record(result)
    scheduler.apply(first, result)
    assert tracker.update_for(scheduler.schedule()) == SampledTokensUpdate([first.req_indices[1]], [4], [42])


def test_what_a_failed_step_announced_is_no_prefix_for_anybody() -> None:
    """Its blocks were published when it was planned; nobody knows what is in them."""
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 13, first=1))
    assert scheduler.schedule() is not None
    scheduler.fail_in_flight("the step failed")
    scheduler.check_integrity()
    scheduler.add(make_request("b", 13, first=1))
    assert scheduled(step(scheduler)) == {"b": 13}
