"""Unknown keys are answered ever later: by peer and in all, within bounds of time and memory."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.serving.auth.attempts import (
    MAX_DELAY_SECONDS,
    MAX_PEERS,
    PEER_BURST,
    PEER_INTERVAL_SECONDS,
    TOTAL_BURST,
    TOTAL_INTERVAL_SECONDS,
    FailedAttempts,
    TooManyAttemptsError,
    network_of,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def until_refused(attempts: FailedAttempts, peers: Iterable[str]) -> tuple[list[float], TooManyAttemptsError]:
    delays = []
    for peer in peers:
        try:
            delays.append(attempts.delay(peer))
        except TooManyAttemptsError as error:
            return delays, error
    raise AssertionError("nobody was refused")


def test_a_peer_gets_a_burst_of_answers_then_one_an_interval_then_none() -> None:
    clock = Clock()
    attempts = FailedAttempts(clock)
    assert [attempts.delay("10.0.0.1") for _ in range(PEER_BURST)] == [0.0] * PEER_BURST
    delays, refusal = until_refused(attempts, repeat("10.0.0.1"))
    assert delays == pytest.approx([PEER_INTERVAL_SECONDS * (1 + index) for index in range(len(delays))])
    assert delays[-1] <= MAX_DELAY_SECONDS
    assert refusal.retry_after_seconds >= 1
    assert attempts.delay("10.0.0.2") == 0.0
    clock.now += 1000
    assert attempts.delay("10.0.0.1") == 0.0


def test_many_peers_together_are_slowed_down_too() -> None:
    attempts = FailedAttempts(Clock())
    delays, _ = until_refused(attempts, (f"10.{index >> 8}.{index & 255}.1" for index in range(10_000)))
    assert not any(delays[:TOTAL_BURST])
    assert len(delays) <= TOTAL_BURST + MAX_DELAY_SECONDS / TOTAL_INTERVAL_SECONDS + 1


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(0, 3)), max_size=300))
def test_what_is_held_at_once_is_bounded(steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    attempts = FailedAttempts(clock)
    held: list[tuple[float, int]] = []
    for pause, peer in steps:
        clock.now += pause
        try:
            held.append((clock.now + attempts.delay(f"10.0.0.{peer}"), peer))
        except TooManyAttemptsError:
            continue
        waiting = [who for until, who in held if until > clock.now]
        assert all(waiting.count(who) <= MAX_DELAY_SECONDS / PEER_INTERVAL_SECONDS + 1 for who in range(4))


def test_peers_are_forgotten_and_not_collected_without_end() -> None:
    clock = Clock()
    attempts = FailedAttempts(clock)
    for index in range(MAX_PEERS + 100):
        clock.now += TOTAL_INTERVAL_SECONDS
        attempts.delay(f"peer {index}")
    assert len(attempts._peers) == MAX_PEERS


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("unix:", "unix:"),
        ("", ""),
    ],
)
def test_an_ipv6_host_is_its_network(peer: str, network: str) -> None:
    assert network_of(peer) == network
