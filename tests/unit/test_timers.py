"""What counts as time without a heartbeat."""

from __future__ import annotations

from pagoda.timers import HeartbeatTimer, SuspendSafeTimer


def test_time_in_which_nobody_checked_counts_as_a_second_at_most() -> None:
    timer = SuspendSafeTimer(100.0)
    assert timer.check(100.5) == 0.5
    assert timer.check(500.0) == 1.5
    assert timer.check(500.25) == 1.75


def test_a_heartbeat_starts_the_time_over() -> None:
    timer = HeartbeatTimer()
    assert timer.check(7.0, 100.0) == 0.0
    assert timer.check(7.0, 100.5) == 0.5
    assert timer.check(8.0, 101.0) == 0.0
    assert timer.check(8.0, 101.25) == 0.25
