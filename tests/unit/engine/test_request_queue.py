"""Requests of many sequences get their places in the queue together, or none."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pagoda.engine.client.request_queue import QueuePlaces, RequestQueue


def has_room(queue: RequestQueue, tenant: str, count: int) -> bool:
    return queue.has_room(tenant, count, num_running=2, limit=8)


def test_places_count_until_they_are_taken_or_given_back():
    queue = RequestQueue()
    with QueuePlaces(queue, "a", 6) as places:
        assert has_room(queue, "a", 4)
        assert not has_room(queue, "a", 5)
        places.take()
        queue.add("a")
        assert queue.num_requests == 6
    assert queue.num_requests == 1
    assert has_room(queue, "a", 9)


def test_a_tenant_that_comes_late_has_its_part():
    queue = RequestQueue()
    queue.add("a", 10)
    assert not has_room(queue, "a", 1)
    assert has_room(queue, "b", 6)  # 2 that may run, and half of 8
    assert not has_room(queue, "b", 7)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30))
def test_as_many_requests_are_taken_as_there_is_room_for_whole_ones(sizes):
    queue = RequestQueue()
    taken = [QueuePlaces(queue, "a", size) for size in sizes if has_room(queue, "a", size)]
    assert queue.num_requests <= 10
    assert taken or min(sizes) > 10
    for places in taken:
        places.__exit__()
    assert queue.num_requests == 0
