"""Requests begin by tenant in turn, a few in each iteration of the event loop."""

from __future__ import annotations

import asyncio

import pytest

from pagoda.serving.auth.keys import ApiKey
from pagoda.serving.request_turns import MAX_STARTS, RequestTurns


async def begin(turns: RequestTurns, tenant: str, order: list[str]) -> None:
    await turns.begin(ApiKey(name=tenant, digest=b"", tenant=tenant))
    order.append(tenant)


async def test_no_iteration_of_the_loop_begins_more_than_some() -> None:
    turns, order = RequestTurns(), list[str]()
    tasks = [asyncio.create_task(begin(turns, "a", order)) for _ in range(200)]
    before = 0
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        assert len(order) - before <= MAX_STARTS
        before = len(order)
    assert len(order) == 200


async def test_another_tenants_request_begins_next() -> None:
    turns, order = RequestTurns(), list[str]()
    tasks = [asyncio.create_task(begin(turns, "a", order)) for _ in range(1000)]
    await asyncio.sleep(0)
    num_before = len(order)
    tasks.append(asyncio.create_task(begin(turns, "b", order)))
    await asyncio.gather(*tasks)
    assert order.index("b") <= num_before + 2 * MAX_STARTS


async def test_a_client_that_leaves_keeps_no_turn() -> None:
    turns, order = RequestTurns(), list[str]()
    tasks = [asyncio.create_task(begin(turns, "a", order)) for _ in range(100)]
    await asyncio.sleep(0)
    for task in tasks[MAX_STARTS:]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.wait_for(begin(turns, "a", order), 5)
    with pytest.raises(asyncio.CancelledError):
        tasks[-1].result()
