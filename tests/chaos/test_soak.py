"""A server under mixed load for a while: its memory, and its engine's, comes to rest."""

from __future__ import annotations

import asyncio
from statistics import median

import pytest

from tests.support.chaos import SETTINGS, asks_of, references_of, watched
from tests.support.load import load
from tests.support.observer import resident_bytes
from tests.support.server import ServerProcess

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

ASKS = asks_of()
WARM_UP_SECONDS, SOAK_SECONDS = 20, 75
LOOK_SECONDS = 0.5
MIB = 2**20
# A leak of 1 KiB a request would be 1 MiB and more in this time; the allocator's own unrest is about as much.
MAX_GROWTH_BYTES = {"server": 4 * MIB, "engine": 4 * MIB}


async def test_memory_comes_to_rest_under_load() -> None:
    with ServerProcess(**SETTINGS) as server:
        server.wait_until_ready()
        pids = {"server": server.process.pid, "engine": server.engine_pid()}
        sizes: dict[str, list[int]] = {name: [] for name in pids}
        async with watched(server) as (clients, observer):
            references = await references_of(clients, ASKS)
            async with load(clients, ASKS, num_clients=16, drop=0.2) as books:
                await asyncio.sleep(WARM_UP_SECONDS)
                for _ in range(int(SOAK_SECONDS / LOOK_SECONDS)):
                    for name, pid in pids.items():
                        sizes[name].append(resident_bytes(pid))
                    await asyncio.sleep(LOOK_SECONDS)
            books.check(references)
            await observer.until_idle()
            assert (await observer.metrics())["engine_restarts_total"] == 0
        third = len(sizes["server"]) // 3
        for name, samples in sizes.items():
            grown = median(samples[-third:]) - median(samples[:third])
            assert grown < MAX_GROWTH_BYTES[name], (
                f"{name} grew by {grown / MIB:.1f} MiB over {len(books.answers)} requests"
            )
