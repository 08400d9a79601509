"""Requests of LoRA adapters: at most `max_loras` run together, of those in memory, and none waits for ever."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.adapters import LoraAdapter
from pagoda.errors import ErrorKind, QueueFullError
from pagoda.sampling.output import FinishReason
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.plan import StepResult
from pagoda.scheduling.request import Request, RequestStatus
from pagoda.scheduling.scheduler import Scheduler
from tests.support.requests import make_request


def adapter_named(name: str, version: str = "1") -> LoraAdapter:
    return LoraAdapter(name, f"/adapters/{name}", version)


def make_scheduler(
    max_loras: int = 2,
    max_cpu_loras: int | None = None,
    max_num_seqs: int = 4,
    policy: str = "fcfs",
    waiting: int = 10**6,
) -> Scheduler:
    limits = SchedulerLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=64,
        max_model_len=64,
        max_num_waiting=waiting,
        policy=policy,
        max_loras=max_loras,
        max_cpu_loras=max_cpu_loras or max_loras,
    )
    return Scheduler(limits, KVCacheManager(257, 4))


class Driver:
    """Runs a scheduler; loads take a step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.running: Counter[str] = Counter()  # adapter of the requests in the last step
        self.loads: list[str] = []
        self.slots: dict[int, LoraAdapter] = {}
        self.reading: list[tuple[int, LoraAdapter]] = []
        self.requests: dict[str, Request] = {}

    def add(self, request_id: str, adapter: str | None = None, max_tokens: int = 2, **fields: object) -> Request:
        request = make_request(
            request_id,
            num_tokens=3,
            first=1,
            max_tokens=max_tokens,
            adapter=None if adapter is None else adapter_named(adapter),
            **fields,
        )
        self.scheduler.add(request)
        self.requests[request_id] = request
        return request

    def step(self) -> None:
        gate = self.scheduler.adapters
        for slot, adapter in self.reading:
            self.slots[slot] = adapter
            self.loads.append(adapter.name)
            gate.loaded(adapter)
        self.reading = []
        plan = self.scheduler.schedule()
        for slot in gate.take_unloads():
            self.slots.pop(slot, None)
        self.reading = gate.take_loads()
        self.running = Counter()
        if plan is not None:
            requests = [self.requests[request_id] for request_id in plan.request_ids]
            self.running = Counter(request.spec.adapter.name for request in requests if request.spec.adapter)
            assert {request.spec.adapter for request in requests} - {None} <= set(self.slots.values())
            self.scheduler.apply(plan, StepResult(plan.step_id, [[1] if samples else [] for samples in plan.samples]))
        self.scheduler.take_ended()
        self.scheduler.check_integrity()

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()


def test_no_more_adapters_run_than_may_and_others_are_not_held_up() -> None:
    driver = Driver(make_scheduler(max_loras=1))
    first = driver.add("first", "a", max_tokens=6)
    other = driver.add("other", "b", max_tokens=6)
    base = driver.add("base", None, max_tokens=6)
    again = driver.add("again", "a", max_tokens=6)
    driver.run(3)
    assert first.status is RequestStatus.RUNNING
    assert base.status is RequestStatus.RUNNING
    assert (other.status, again.status) == (RequestStatus.WAITING, RequestStatus.WAITING)  # `again` comes after `other`
    assert driver.scheduler.num_waiting == 2
    assert (driver.scheduler.adapters.running, driver.scheduler.adapters.waiting) == (["a"], ["a", "b"])
    driver.run(20)
    assert all(request.finish_reason is FinishReason.LENGTH for request in driver.requests.values())
    assert driver.loads == ["a", "b", "a"]


def test_an_adapter_with_a_place_is_joined_while_no_other_wants_it() -> None:
    driver = Driver(make_scheduler(max_loras=1))
    driver.add("first", "a", max_tokens=20)
    driver.run(3)
    second = driver.add("second", "a")
    driver.step()
    assert second.status is not RequestStatus.WAITING


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_stream_of_one_adapter_does_not_starve_another(policy: str) -> None:
    driver = Driver(make_scheduler(max_loras=1, max_cpu_loras=2, policy=policy))
    for number in range(4):
        driver.add(f"a{number}", "a", max_tokens=4)
    driver.run(3)
    other = driver.add("b", "b")
    for number in range(30):
        driver.add(f"more{number}", "a", max_tokens=4)
        driver.step()
        if other.finish_reason is not None:
            break
    assert other.finish_reason is FinishReason.LENGTH
    assert number < 12


def test_adapters_of_two_tenants_take_turns() -> None:
    driver = Driver(make_scheduler(max_loras=1, max_cpu_loras=2, max_num_seqs=2))
    for number in range(40):
        driver.add(f"a{number}", "a", tenant="x")
    driver.run(3)
    late = driver.add("late", "b", tenant="y")
    driver.run(12)
    assert late.finish_reason is FinishReason.LENGTH


def test_weights_that_were_used_least_recently_make_room() -> None:
    driver = Driver(make_scheduler(max_loras=1, max_cpu_loras=2))
    for name in ("a", "b", "a", "c", "a", "b"):
        driver.add(f"{name}{len(driver.requests)}", name)
        driver.run(8)
    assert driver.loads == ["a", "b", "c", "b"]
    assert sorted(adapter.name for adapter in driver.slots.values()) == ["a", "b"]


def test_an_adapter_that_cannot_be_loaded_ends_its_own_requests_only() -> None:
    scheduler = make_scheduler()
    driver = Driver(scheduler)
    lost, kept = driver.add("lost", "a"), driver.add("kept", "b")
    scheduler.schedule()
    loads = dict(scheduler.adapters.take_loads())
    broken = next(adapter for adapter in loads.values() if adapter.name == "a")
    scheduler.adapters.failed(broken)
    scheduler.fail_requests_of(broken, ErrorKind.INVALID_REQUEST, "it is gone")
    assert (lost.finish_reason, lost.error) == (FinishReason.ERROR, "it is gone")
    scheduler.adapters.loaded(next(adapter for adapter in loads.values() if adapter.name == "b"))
    driver.slots = {slot: adapter for slot, adapter in loads.items() if adapter.name == "b"}
    driver.run(5)
    assert kept.finish_reason is FinishReason.LENGTH
    assert not scheduler.find_leak()


def test_requests_that_step_aside_count_in_the_queue_and_can_be_aborted() -> None:
    driver = Driver(make_scheduler(max_loras=1, max_num_seqs=4, waiting=2))
    driver.add("a", "a", max_tokens=30)
    driver.run(3)
    for number in range(5):
        driver.add(f"b{number}", "b")
        driver.step()
    with pytest.raises(QueueFullError):
        driver.add("too many", "b")
    driver.scheduler.abort([f"b{number}" for number in range(5)] + ["a"])
    driver.step()
    assert not driver.scheduler.has_work
    assert not driver.scheduler.find_leak()


def test_a_retired_adapter_gives_its_slot_back_once_it_has_no_requests() -> None:
    driver = Driver(make_scheduler())
    gate = driver.scheduler.adapters
    assert gate.want(adapter_named("a"))
    assert not gate.want(adapter_named("a"))
    driver.reading = gate.take_loads()
    driver.add("a", "a", max_tokens=6)
    driver.run(2)
    gate.retire(adapter_named("a"))
    assert driver.slots
    driver.run(8)
    assert not driver.slots
    driver.reading = []
    gate.want(adapter_named("b"))
    driver.reading = gate.take_loads()
    gate.retire(adapter_named("b"))  # while it is read
    driver.run(2)
    assert not driver.slots


ARRIVALS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.sampled_from("xxy")), max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    arrivals=st.lists(ARRIVALS, min_size=2, max_size=12),
    max_loras=st.integers(1, 3),
    extra=st.integers(0, 2),
    max_num_seqs=st.sampled_from([2, 3, 8]),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_every_request_has_its_turn_whatever_comes_after_it(
    arrivals: list[list[tuple[int, int, str]]], max_loras: int, extra: int, max_num_seqs: int, policy: str
) -> None:
    """While requests of other adapters come without end."""
    driver = Driver(make_scheduler(max_loras, max_loras + extra, max_num_seqs, policy))
    for batch in arrivals:
        for number, max_tokens, tenant in batch:
            name = None if number == 5 else f"adapter{number}"
            driver.add(str(len(driver.requests)), name, max_tokens, tenant=tenant)
        driver.step()
    pending = list(driver.requests.values())
    for turn in range(60 + 12 * len(pending)):
        if turn % 2:
            driver.add(f"stream{turn}", "adapter0", 3, tenant="x")
        driver.step()
        if all(request.finish_reason is not None for request in pending):
            break
    assert all(request.finish_reason is FinishReason.LENGTH for request in pending)
