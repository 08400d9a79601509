"""Whose turn it is: tenants share the places of a bounded waiting queue and the request slots that become free."""

from __future__ import annotations

from collections import Counter

import pytest

from pagoda.errors import QueueFullError
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.deadlines import Deadlines
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.plan import StepResult
from pagoda.scheduling.request import Request, RequestStatus
from pagoda.scheduling.scheduler import Scheduler
from tests.support.requests import make_request
from tests.support.virtual_time import Clock


def make_scheduler(max_num_waiting: int, max_num_seqs: int = 2) -> Scheduler:
    limits = SchedulerLimits(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=64, max_model_len=64, max_num_waiting=max_num_waiting
    )
    return Scheduler(limits, KVCacheManager(65, 4))


def request_of(tenant: str, request_id: str) -> Request:
    return make_request(request_id, num_tokens=3, first=1, max_tokens=2, tenant=tenant)


def fill(scheduler: Scheduler, tenant: str, prefix: str = "") -> int:
    """Send requests of a tenant until one is refused; how many were taken."""
    for number in range(1000):
        try:
            scheduler.add(request_of(tenant, f"{tenant}{prefix}{number}"))
        except QueueFullError:
            return number
    raise AssertionError("nothing was refused")


def step(scheduler: Scheduler) -> list[str]:
    """Run a step; the tenants of the requests that entered it."""
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.apply(plan, StepResult(plan.step_id, [[1] for _ in plan.req_indices]))
    scheduler.check_integrity()
    return [new.spec.request_id[0] for new in plan.new_requests]


def test_tenants_take_turns_however_much_one_of_them_sends() -> None:
    scheduler = make_scheduler(max_num_waiting=100)
    for index in range(20):
        scheduler.add(request_of("a", f"a{index}"))
    for tenant in "bc":
        for index in range(3):
            scheduler.add(request_of(tenant, f"{tenant}{index}"))
    entered: list[str] = []
    while len(entered) < 9:
        entered += step(scheduler)
    assert Counter(entered[:9]) == {"a": 3, "b": 3, "c": 3}


def test_one_tenant_may_have_the_whole_queue_and_does_not_keep_others_out() -> None:
    scheduler = make_scheduler(max_num_waiting=12)
    assert fill(scheduler, "a") == 2 + 12  # both request slots, and the queue
    assert fill(scheduler, "b") == 6
    assert fill(scheduler, "c") == 4
    assert fill(scheduler, "a", "again") == 0
    scheduler.check_integrity()


def test_a_tenant_is_never_refused_while_request_slots_are_free() -> None:
    scheduler = make_scheduler(max_num_waiting=1, max_num_seqs=8)
    assert fill(scheduler, "a") == 8 + 1


def test_without_keys_the_whole_queue_is_everybodys() -> None:
    scheduler = make_scheduler(max_num_waiting=12)
    assert fill(scheduler, "") == 2 + 12


def test_places_of_aborted_requests_are_free_again_at_once() -> None:
    scheduler = make_scheduler(max_num_waiting=12)
    num_taken = fill(scheduler, "a")
    scheduler.abort(f"a{number}" for number in range(num_taken))
    assert fill(scheduler, "a", "again") == num_taken


def test_a_long_request_does_not_keep_those_that_came_and_went_after_it() -> None:
    deadlines = Deadlines(3600.0)
    for number in range(1000):
        request = make_request(f"r{number}")
        request.sequence_number = number
        deadlines.add(request)
        if number:
            request.status = RequestStatus.FINISHED
    assert len(deadlines) < 200
    assert deadlines.take_overdue() == []


@pytest.mark.parametrize("max_seconds", [None, 10.0])
def test_overdue_requests_are_given_once(max_seconds: float | None) -> None:
    clock = Clock()
    deadlines = Deadlines(max_seconds, clock)
    requests = [make_request("a"), make_request("b")]
    for number, request in enumerate(requests):
        request.sequence_number = number
        deadlines.add(request)
    assert deadlines.take_overdue() == []
    clock.advance(10.0)
    assert deadlines.take_overdue() == ([] if max_seconds is None else requests)
    assert deadlines.take_overdue() == []
