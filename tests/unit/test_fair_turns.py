"""Turns at a pool that tenants share."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from pagoda.errors import QueueFullError
from pagoda.fair_turns import FairTurns
from tests.support.virtual_time import in_virtual_time


async def work(turns: FairTurns, tenant: str, order: list[str], weight: float = 1.0, timeout: float = 1e6) -> None:
    await turns.take(tenant, weight, timeout)
    try:
        order.append(tenant)
        await asyncio.sleep(1.0)
    finally:
        turns.give_back()


@in_virtual_time
async def test_who_comes_late_waits_for_one_turn_of_each_other_tenant() -> None:
    turns, order = FairTurns(2, 1000, "a worker"), list[str]()
    tasks = [asyncio.create_task(work(turns, "a", order)) for _ in range(100)]
    await asyncio.sleep(0.5)
    tasks += [asyncio.create_task(work(turns, tenant, order)) for tenant in "bcbc"]
    await asyncio.gather(*tasks)
    assert len(order) == 104
    assert Counter(order[2:8]) == {"a": 2, "b": 2, "c": 2}
    assert (turns._num_free, turns.num_waiting) == (2, 0)


@in_virtual_time
async def test_turns_are_given_by_weight() -> None:
    turns, order = FairTurns(1, 1000, "a worker"), list[str]()
    await asyncio.gather(
        *(work(turns, tenant, order, weight) for _ in range(60) for tenant, weight in (("a", 1), ("b", 3)))
    )
    assert 28 <= Counter(order[:40])["b"] <= 31


@in_virtual_time
async def test_one_tenant_may_have_all_places_and_does_not_keep_others_out() -> None:
    turns, order = FairTurns(1, 10, "a worker"), list[str]()
    tasks = [asyncio.create_task(work(turns, "a", order)) for _ in range(11)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="10 requests wait for a worker, 10 of them of this API key; 10 may"):
        await turns.take("a", 1.0, 1.0)
    tasks += [asyncio.create_task(work(turns, "b", order)) for _ in range(5)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await turns.take("b", 1.0, 1.0)
    await asyncio.gather(*tasks)
    assert len(order) == 16


@in_virtual_time
async def test_a_turn_is_not_lost_with_who_waited_for_it() -> None:
    turns, order = FairTurns(1, 10, "a worker"), list[str]()
    first = asyncio.create_task(work(turns, "a", order))
    await asyncio.sleep(0)
    left = asyncio.create_task(work(turns, "b", order))
    late = asyncio.create_task(work(turns, "c", order, timeout=0.5))
    stays = asyncio.create_task(work(turns, "d", order))
    await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(TimeoutError):
        await late
    await asyncio.gather(first, stays)
    assert order == ["a", "d"]
    await work(turns, "e", order)
    # A turn that was granted in the same pass of the loop in which its owner was cancelled.
    first, second = (asyncio.create_task(work(turns, "a", order)) for _ in range(2))
    await asyncio.sleep(0)
    turns.give_back()
    second.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    assert turns._num_free == 2  # one was given back twice
