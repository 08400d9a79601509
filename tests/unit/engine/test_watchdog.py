"""When a core counts as stuck, and when one that was lost is replaced: arithmetic, without processes or clocks."""

from __future__ import annotations

import pytest

from pagoda.engine.client.restarts import FIRST_BACKOFF_SECONDS, HEALTHY_SECONDS, LONGEST_BACKOFF_SECONDS, RestartPolicy
from pagoda.engine.client.watchdog import Watchdog
from pagoda.engine.heartbeat import EngineHeartbeat, SharedHeartbeat
from pagoda.scheduling.plan import StepPlan
from pagoda.scheduling.step_timeout import stall_bound, tokens_to_wait_for

TIMEOUT = 10.0
LOOK_SECONDS = 0.25


def seconds_until_stuck(
    scheduled_tokens: int, *, signs: list[float] | None = None, limit: float = 500.0
) -> float | None:
    """When the watch first says so, of a core whose signs of life come at these times (the last one stays); None: never."""
    watch = Watchdog(TIMEOUT)
    times = signs or [100.0]
    now = times[0]
    while now < times[0] + limit:
        now += LOOK_SECONDS
        sign = max(time for time in times if time <= now)
        if watch.check(EngineHeartbeat(7, sign, scheduled_tokens, is_busy=True), now) is not None:
            return now - times[-1]
    return None


@pytest.mark.parametrize(("tokens", "bound"), [(0, 10.0), (1, 10.0), (512, 10.0), (1024, 20.0), (8192, 160.0)])
def test_the_bound_grows_with_the_tokens_of_the_step(tokens: int, bound: float) -> None:
    assert stall_bound(tokens, TIMEOUT) == bound
    noticed = seconds_until_stuck(tokens)
    assert noticed is not None
    assert bound < noticed <= bound + 3 * LOOK_SECONDS


def test_a_core_that_goes_on_giving_signs_is_never_stuck() -> None:
    assert seconds_until_stuck(1, signs=[100.0 + 9.5 * index for index in range(60)]) is None


def test_a_multi_step_plan_has_time_for_all_its_steps() -> None:
    plan = StepPlan(step_id=0, num_scheduled_tokens=[1, 1], num_steps=[64, 30])
    assert tokens_to_wait_for(plan) == 64 * 32
    assert tokens_to_wait_for(StepPlan(step_id=0, num_scheduled_tokens=[700, 1])) == 701


def test_a_watcher_that_was_stopped_itself_does_not_blame_the_core() -> None:
    watch = Watchdog(TIMEOUT)
    progress = EngineHeartbeat(7, 100.0, 1, is_busy=True)
    assert watch.check(progress, 100.2) is None
    assert watch.check(progress, 1000.0) is None  # the server slept for a quarter of an hour, its core with it
    trouble = [watch.check(progress, 1000.0 + LOOK_SECONDS * look) for look in range(1, 60)]
    assert trouble[0] is None
    assert "no heartbeat" in str(trouble[-1])  # it did not wake up with its server


def test_a_core_that_never_gave_a_sign_is_not_up() -> None:
    heartbeat = SharedHeartbeat()
    assert not heartbeat.read().is_up
    heartbeat.write(0, 0, is_busy=False)
    assert heartbeat.read().is_up
    heartbeat.close()


def test_pauses_grow_to_a_bound_and_restarts_are_counted() -> None:
    policy = RestartPolicy("restart", 9)
    pauses = []
    for second in range(10):
        policy.core_started(second)
        pauses.append(policy.backoff(second + 0.5))
    assert pauses[:3] == [FIRST_BACKOFF_SECONDS, 4 * FIRST_BACKOFF_SECONDS, 16 * FIRST_BACKOFF_SECONDS]
    assert pauses[7:] == [LONGEST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS, None]


def test_a_core_that_had_outputs_is_replaced_at_once() -> None:
    policy = RestartPolicy("restart", 9)
    pauses = []
    for second in range(10):
        policy.core_started(second)
        policy.has_served = True
        pauses.append(policy.backoff(second + 0.5))
    assert pauses == [FIRST_BACKOFF_SECONDS] * 9 + [None]


def test_a_core_that_lived_long_earns_its_restarts_back() -> None:
    policy = RestartPolicy("restart", 1)
    policy.core_started(0.0)
    assert policy.backoff(1.0) == FIRST_BACKOFF_SECONDS
    policy.core_started(2.0)
    assert policy.backoff(3.0 + HEALTHY_SECONDS) == FIRST_BACKOFF_SECONDS
    policy.core_started(4.0 + HEALTHY_SECONDS)
    assert policy.backoff(5.0 + HEALTHY_SECONDS) is None


def test_policy_exit_never_restarts() -> None:
    policy = RestartPolicy("exit", 9)
    policy.core_started(0.0)
    assert policy.backoff(1.0) is None
