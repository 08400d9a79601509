"""Several tenants share an engine: whatever one of them sends, the others are served as if it had its share only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from pagoda.errors import QueueFullError
from pagoda.scheduling.tenant_shares import MAX_FLOWS
from tests.support.timed_engine import TimedEngine


def fill_queue(engine: TimedEngine, num_prompt_tokens: int, max_tokens: int, count: int = 2560, **fields: Any) -> None:
    """Send requests of tenant a until the queue takes no more."""
    for _ in range(count):
        try:
            engine.add("a", num_prompt_tokens, max_tokens, **fields)
        except QueueFullError:
            return


FLOODS: dict[str, Callable[[TimedEngine], None]] = {
    "long outputs": lambda engine: fill_queue(engine, 20, 1900, count=400),
    "long prompts": lambda engine: fill_queue(engine, 1900, 20, count=400),
    "very long prompts": lambda engine: fill_queue(engine, 15_000, 20, count=400),
    "many sequences": lambda engine: fill_queue(engine, 20, 400, count=40 * 64),
    "one request that has all blocks": lambda engine: fill_queue(engine, 8000, 8000, count=1),
    "the highest priority": lambda engine: fill_queue(engine, 20, 1900, count=400, priority=-(2**31)),
}


def check_second_tenant(flood: str, fixed: float, policy: str, caching: bool, num_usable: int) -> None:
    """While tenant a floods the engine, requests of tenant b take three times as long as alone at most."""
    engine = TimedEngine(
        policy=policy, caching=caching, num_usable=num_usable, fixed=fixed, long_prefill_token_threshold=None
    )
    FLOODS[flood](engine)
    engine.run_until(lambda: len(engine.plans) == 100)
    for num_prompt_tokens in (10, 10, 300, 10):
        seconds = engine.seconds_of("b", num_prompt_tokens, 8)
        assert seconds <= 3 * engine.seconds_alone(num_prompt_tokens, 8), (num_prompt_tokens, seconds)
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("fixed", [0.0, 8.0, 500.0])  # in tokens: what a step costs besides its tokens
@pytest.mark.parametrize("flood", FLOODS)
def test_a_second_tenant_takes_three_times_as_long_as_alone_at_most(flood: str, fixed: float) -> None:
    policy = "priority" if "priority" in flood else "fcfs"
    check_second_tenant(flood, fixed, policy, caching=fixed != 8.0, num_usable=8192 if fixed else 1024)


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [0.0, 8.0, 500.0])
@pytest.mark.parametrize("flood", FLOODS)
def test_a_second_tenant_takes_three_times_as_long_as_alone_at_most_in_every_setting(flood: str, fixed: float) -> None:
    for policy, caching, num_usable in product(("fcfs", "priority"), (True, False), (8192, 1024)):
        check_second_tenant(flood, fixed, policy, caching, num_usable)


def test_a_tenant_that_sends_one_request_after_another_costs_the_others_few_preemptions() -> None:
    engine = TimedEngine(long_prefill_token_threshold=None)
    FLOODS["long outputs"](engine)
    engine.run_until(lambda: len(engine.plans) == 100)
    for _ in range(100):
        engine.seconds_of("b", 10, 8)
    preemptions = [request.num_preemptions for request in engine.requests.values()]
    assert sum(preemptions) == 1


@pytest.mark.parametrize("caching", [True, False])
def test_what_is_preempted_again_and_again_ends_all_the_same(caching: bool) -> None:
    """A tenant that comes back just when nobody waits for it any more."""
    engine = TimedEngine(max_num_seqs=4, caching=caching, long_prefill_token_threshold=None)
    flood = [engine.add("a", 200, 300) for _ in range(12)]
    count = 0
    while not all(request.is_finished for request in flood):
        engine.seconds_of("b", 10, 8)
        engine.step()
        count += 1
        assert count < 4000
    assert all(request.num_output_tokens == 300 for request in flood)
    # Between two preemptions a request computes what they cost it, and some more.
    assert max(request.num_preemptions for request in flood) < 300 // 16
    num_needed = sum(request.num_tokens for request in engine.requests.values())
    assert engine.num_tokens_run < (1.2 if caching else 2) * num_needed


def test_tokens_are_shared_by_weight() -> None:
    engine = TimedEngine(max_num_seqs=8, fixed=0.0, max_num_batched_tokens=64, long_prefill_token_threshold=None)
    for _ in range(400):
        engine.add("a", 100, 5)
        engine.add("b", 100, 5, tenant_weight=3.0)
    engine.run_until(lambda: len(engine.plans) == 300)
    served = Counter[str]()
    for request in engine.requests.values():
        served[request.spec.tenant] += request.num_computed_tokens
    assert 2.5 < served["b"] / served["a"] < 3.5


def test_a_lone_tenant_has_everything() -> None:
    engine = TimedEngine(num_usable=640, long_prefill_token_threshold=None)
    for _ in range(100):
        engine.add("a", 32, 100)
    engine.run_until(lambda: len(engine.plans) == 60)
    assert engine.scheduler.num_running == 32
    assert all(request.num_preemptions == 0 for request in engine.requests.values())


def test_what_a_tenant_leaves_is_the_others() -> None:
    """Also request slots beyond a share, and at once."""
    engine = TimedEngine(fixed=100.0, long_prefill_token_threshold=None)
    for _ in range(100):
        engine.add("a", 32, 100)
    b = engine.add("b", 32, 1000)
    engine.run_until(lambda: len(engine.plans) == 60)
    assert engine.scheduler.num_running == 32
    assert not b.is_finished


def test_what_others_left_is_not_held_against_a_tenant() -> None:
    """One that comes later has no turn before it for all that it had while nobody else wanted it."""
    engine = TimedEngine(max_num_batched_tokens=8, max_model_len=128, long_prefill_token_threshold=None)
    engine.add("light", 5, 100)
    for _ in range(50):
        engine.add("heavy", 60, 5)
    engine.run_until(lambda: len(engine.plans) == 95)
    light, heavy = (tenant.num_served_tokens for tenant in engine.scheduler._shares.tenants.values())
    assert engine.num_tokens_run > 4 * light
    assert light < heavy <= light + 128 + 8


def test_more_tenants_than_request_slots_take_turns() -> None:
    engine = TimedEngine(max_num_seqs=4, long_prefill_token_threshold=None)
    for index in range(200):
        engine.add("abcdefghij"[index % 10] if index < 20 else "a", 20, 20)
    engine.run_until(lambda: all(request.is_finished for request in list(engine.requests.values())[:20]))
    ended = [request for request in engine.requests.values() if request.is_finished]
    assert len(ended) < 32, "the flood of a is not served before the others"
    assert sum(request.num_preemptions for request in engine.requests.values()) == 0


@pytest.mark.parametrize("flood", ["long outputs", "long prompts"])
def test_a_second_flow_of_a_tenant_takes_three_times_as_long_as_alone_at_most(flood: str) -> None:
    engine = TimedEngine(long_prefill_token_threshold=None)
    FLOODS[flood](engine)
    engine.run_until(lambda: len(engine.plans) == 100)
    for num_prompt_tokens in (10, 10, 300):
        seconds = engine.seconds_of("a", num_prompt_tokens, 8, fairness_id="other")
        assert seconds <= 3 * engine.seconds_alone(num_prompt_tokens, 8)
    engine.scheduler.check_integrity()


def test_many_flows_do_not_make_the_share_of_a_tenant_larger() -> None:
    engine = TimedEngine(long_prefill_token_threshold=None, max_num_waiting=4096)
    for number in range(100):
        for _ in range(4):
            engine.add("a", 20, 1900, fairness_id=str(number))
    assert len(engine.scheduler._shares.tenants) == MAX_FLOWS + 1  # the others are of the flow without an id
    engine.run_until(lambda: len(engine.plans) == 100)
    for num_prompt_tokens in (10, 10, 300):
        seconds = engine.seconds_of("b", num_prompt_tokens, 8)
        assert seconds <= 3 * engine.seconds_alone(num_prompt_tokens, 8)


def test_what_is_due_first_is_served_first_and_nobody_waits_longer_than_a_minute_for_it() -> None:
    engine = TimedEngine(policy="priority", max_num_seqs=1, long_prefill_token_threshold=None)
    running = engine.add("a", 10, 5)
    engine.step()
    plain = engine.add("a", 10, 5)
    soon, later = engine.add("a", 10, 5, ttft_slo=0.5), engine.add("a", 10, 5, ttft_slo=0.8)
    urgent = engine.add("a", 10, 5, priority=-1)
    engine.run_until(lambda: all(request.is_finished for request in (running, plain, soon, later, urgent)))
    began = [engine.token_times[request.spec.request_id][0] for request in (running, urgent, soon, later, plain)]
    assert began == sorted(began)
    first = engine.add("a", 10, 5)
    engine.step()
    waiting = engine.add("a", 10, 5)
    engine.clock.advance(61)
    hurried = engine.add("a", 10, 5, ttft_slo=0.5)
    engine.run_until(lambda: hurried.is_finished)
    assert engine.token_times[waiting.spec.request_id][0] < engine.token_times[hurried.spec.request_id][0]
    assert first.is_finished
