"""Bytes of requests that are being received: a bound on all, room for who comes next."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.errors import QueueFullError
from pagoda.serving.request_memory import UNCOUNTED_BYTES, RequestMemory, Reservation

LIMIT = 100 * UNCOUNTED_BYTES
LARGE = 10 * UNCOUNTED_BYTES


def test_a_tenant_holds_as_much_as_is_free_and_leaves_room_for_the_next() -> None:
    memory = RequestMemory(LIMIT)
    held: dict[str, list[Reservation]] = {}
    for tenant in ("a", "b", "c"):
        held[tenant] = []
        for _ in range(10):
            reservation = Reservation(memory, tenant)
            with suppress(QueueFullError):
                reservation.grow(LARGE)
                held[tenant].append(reservation)
    # In tenths of the limit: half of it, half of what that leaves and what goes with it, and so on.
    assert [len(reservations) for reservations in held.values()] == [5, 3, 1]
    with pytest.raises(QueueFullError, match="max_inflight_body_bytes"):
        Reservation(memory, "a").grow(LARGE)
    held["a"].pop().release()
    Reservation(memory, "d").grow(LARGE)


def test_a_small_body_is_never_refused_and_one_that_grows_is_counted_whole() -> None:
    memory = RequestMemory(UNCOUNTED_BYTES)
    reservation = Reservation(memory, "a")
    reservation.grow(UNCOUNTED_BYTES)
    assert memory.num_bytes == 0
    with pytest.raises(QueueFullError):
        reservation.grow(1)
    memory = RequestMemory(LIMIT)
    reservation = Reservation(memory, "a")
    for _ in range(LARGE):
        reservation.grow(1)
    assert memory.num_bytes == LARGE


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, LIMIT), st.booleans()),
        max_size=60,
    )
)
def test_whatever_is_asked_for_the_bound_holds_and_everything_comes_back(asked: list[tuple[str, int, bool]]) -> None:
    memory = RequestMemory(LIMIT)
    held: list[Reservation] = []
    for tenant, size, is_released in asked:
        reservation = Reservation(memory, tenant)
        held.append(reservation)
        try:
            reservation.grow(size)
        except QueueFullError:
            reservation.release()
        if is_released:
            held[len(asked) % len(held)].release()
        assert 0 <= memory.num_bytes <= LIMIT
    for reservation in held:
        reservation.release()
        reservation.release()
    assert memory.num_bytes == 0
