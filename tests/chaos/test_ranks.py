"""Every rank of a model in two processes, and what drives them, is killed and stopped under load."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support.chaos import (
    BUSY_SECONDS,
    SETTINGS,
    STALL_SECONDS,
    asks_of,
    check_same_answers,
    references_of,
    watched,
)
from tests.support.load import Clients, load
from tests.support.notes import Note
from tests.support.observer import Observer, is_there
from tests.support.server import ServerProcess
from tests.support.waiting import wait_until_async

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
ASKS = asks_of(("generate", "generate_stream", "completions", "grpc_stream"))
HEARTBEAT_SECONDS = 5.0

Ranks = list[dict[str, Any]]


@asynccontextmanager
async def server_of(**settings: object) -> AsyncIterator[tuple[ServerProcess, Clients, Observer]]:
    values = {
        **SETTINGS,
        "rank_heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "engine_stall_timeout_seconds": 20,
        **settings,
    }
    with ServerProcess(**values) as server:
        server.wait_until_ready()
        async with watched(server) as (clients, observer):
            yield server, clients, observer


async def ranks_of(observer: Observer) -> Ranks:
    """The ranks as `/health` shows them once it has heard of them."""
    async with asyncio.timeout(60):
        while True:
            found: Ranks = (await observer.health())["ranks"]
            if found and all(rank["up"] for rank in found):
                return found
            await asyncio.sleep(0.1)


async def disturb(
    observer: Observer, pid: int, number: signal.Signals, before: Ranks, *, within: float, cause: str
) -> Ranks:
    """Signal a process of the group: the server is unready in time and says why, all ranks are new, and the old ones gone."""
    sent_at = observer.sights[-1].time
    os.kill(pid, number)
    flipped = await observer.until_state("starting")
    assert flipped.time - sent_at < within + BUSY_SECONDS
    assert cause in (await observer.health())["cause"]
    await observer.until_state("ready", seconds=240)
    after = await ranks_of(observer)
    await wait_until_async(lambda: not any(is_there(rank["pid"]) for rank in before), seconds=30)
    assert not {rank["pid"] for rank in before} & {rank["pid"] for rank in after}
    return after


@pytest.mark.parametrize(
    "settings", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["tensor", "pipeline"]
)
async def test_a_killed_or_stopped_rank_is_replaced_with_all_others_and_answers_are_the_same(
    settings, note: Note
) -> None:
    async with server_of(**settings) as (server, clients, observer):
        references = await references_of(clients, ASKS)
        ranks = await ranks_of(observer)
        async with load(clients, ASKS, num_clients=8) as books:
            for number in (0, 1):
                await wait_until_async(lambda: len(books.of("finished")) > 8, seconds=120)
                ranks = await disturb(
                    observer, ranks[number]["pid"], signal.SIGKILL, ranks, within=1.0, cause=f"rank {number} of 2"
                )
                ranks = await disturb(
                    observer,
                    ranks[number]["pid"],
                    signal.SIGSTOP,
                    ranks,
                    within=HEARTBEAT_SECONDS,
                    cause=f"rank {number} of 2",
                )
        books.check(references)
        note(f"SIGKILL and SIGSTOP of each of two ranks ({settings}): {books.summary}")
        assert all(sight.is_live for sight in observer.sights)
        assert not [answer for answer in books.of("failed", "refused") if not answer.is_retriable]
        await observer.until_idle()
        await check_same_answers(clients, ASKS, references)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert not any(is_there(rank["pid"]) for rank in ranks)


async def test_the_engine_that_drives_the_ranks_takes_them_with_it_when_it_is_killed_or_stopped(note: Note) -> None:
    async with server_of(tensor_parallel_size=2, engine_stall_timeout_seconds=STALL_SECONDS) as (
        server,
        clients,
        observer,
    ):
        references = await references_of(clients, ASKS)
        ranks = await ranks_of(observer)
        async with load(clients, ASKS, num_clients=8) as books:
            ranks = await disturb(
                observer, server.engine_pid(), signal.SIGKILL, ranks, within=1.0, cause="was killed by SIGKILL"
            )
            ranks = await disturb(
                observer, server.engine_pid(), signal.SIGSTOP, ranks, within=STALL_SECONDS, cause="no heartbeat"
            )
        books.check(references)
        note(f"SIGKILL and SIGSTOP of the engine of two ranks: {books.summary}")
        assert not [answer for answer in books.of("failed", "refused") if not answer.is_retriable]
        server.send_signal(signal.SIGKILL)
        server.wait()
        await wait_until_async(lambda: not any(is_there(rank["pid"]) for rank in ranks), seconds=30)


@pytest.mark.parametrize(("fault", "cause"), [("oom", "out-of-memory"), ("sleep:600", "step")], ids=["memory", "hang"])
async def test_a_rank_that_does_not_do_its_part_of_a_step_ends_the_group_and_is_named(
    fault: str, cause: str, note: Note
) -> None:
    # The others are in the step's collectives by then. The new ranks count their steps from one again.
    settings = {"fault_injection": f"step@1#40={fault}", "collective_timeout_seconds": 5}
    async with server_of(tensor_parallel_size=2, **settings) as (_, clients, observer):
        async with load(clients, ASKS, num_clients=4) as books:
            await observer.until_state("starting", seconds=120)
            told = (await observer.health())["cause"]
            assert "rank 1 of 2" in told
            assert cause in told
            await observer.until_state("ready", seconds=240)
        note(f"{fault} on one of two ranks: {books.summary}")
        assert not [answer for answer in books.of("failed", "refused") if not answer.is_retriable]
