"""Two real replicas as one engine: the answers of one, prefixes kept together, and a loss that half of the requests notice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.interface import EngineClient
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.engine.data_parallel.client import DataParallelClient
from pagoda.engine.data_parallel.router import Placement, PrefixRouter
from pagoda.engine.health import EngineState
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from tests.support.waiting import wait_until_async

SETTINGS = {
    "device": "cpu",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 300,
    "num_gpu_blocks_override": 161,
    "threads": 1,
    "max_engine_restarts": 5,
}
NUM_GROUPS, GROUP_SIZE, PREFIX_TOKENS = 6, 8, 160

pytestmark = pytest.mark.timeout(600)


@asynccontextmanager
async def two_replicas(
    checkpoint: Path, router: PrefixRouter | None = None, **fields
) -> AsyncIterator[DataParallelClient]:
    config = PagodaConfig(model=str(checkpoint), data_parallel_size=2, **(SETTINGS | fields))
    client = DataParallelClient(config, router)
    try:
        await client.start()
        yield client
    finally:
        await client.shutdown()


def requests_of(num: int, length: int = 12, max_tokens: int = 12) -> list[EngineRequest]:
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    return [
        EngineRequest(
            request_id=f"r{number}",
            prompt_token_ids=[3 + (number * 31 + position * 7) % 400 for position in range(length)],
            params=sampling,
            max_tokens=max_tokens,
        )
        for number in range(num)
    ]


def grouped_requests() -> list[EngineRequest]:
    """Groups that share a long beginning, in random order."""
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    requests = [
        EngineRequest(
            request_id=f"g{group}-{member}",
            prompt_token_ids=[3 + (group * 37 + position * 5) % 400 for position in range(PREFIX_TOKENS)] + [9, member],
            params=sampling,
            max_tokens=4,
        )
        for group in range(NUM_GROUPS)
        for member in range(GROUP_SIZE)
    ]
    random.Random(7).shuffle(requests)
    return requests


def answers_of_one(checkpoint: Path, requests: list[EngineRequest]) -> dict[str, list[int]]:
    core: EngineCore = start_core(PagodaConfig(model=str(checkpoint), **SETTINGS))
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        core.add_request(request)
    while core.has_work:
        for output in core.step().outputs:
            answers[output.request_id] += output.new_token_ids
    return answers


async def run(client: EngineClient, request: EngineRequest) -> list[int]:
    tokens: list[int] = []
    async for output in client.submit(request):
        tokens += output.new_token_ids
    return tokens


async def run_all(client: EngineClient, requests: list[EngineRequest], at_once: int) -> dict[str, list[int]]:
    places = asyncio.Semaphore(at_once)

    async def one(request: EngineRequest) -> tuple[str, list[int]]:
        async with places:
            return request.request_id, await run(client, request)

    return dict(await asyncio.gather(*map(one, requests)))


class RoundRobin(PrefixRouter):
    """Every replica in turn."""

    def place(self, request: EngineRequest, candidates: Collection[int]) -> Placement:
        self.num_placed = getattr(self, "num_placed", 0) + 1
        return super().place(request, [sorted(candidates)[self.num_placed % len(candidates)]])


async def test_replicas_answer_as_one_engine_does_and_keep_prefixes_together(checkpoint: Path) -> None:
    requests = grouped_requests()
    expected = answers_of_one(checkpoint, requests)
    async with two_replicas(checkpoint) as client:
        assert await run_all(client, requests, at_once=4) == expected
        await wait_until_async(lambda: client.stats.num_running == 0)
        assert all(replica.stats.num_scheduled_tokens for replica in client.replicas)
        hits = client.stats.prefix_cache_hits
    async with two_replicas(checkpoint, RoundRobin(2, 16)) as client:
        assert await run_all(client, requests, at_once=4) == expected
        await wait_until_async(lambda: client.stats.num_running == 0)
        assert hits > client.stats.prefix_cache_hits


async def test_a_killed_replica_changes_no_answer_and_comes_back(checkpoint: Path) -> None:
    requests = requests_of(14, max_tokens=150)
    expected = answers_of_one(checkpoint, requests)
    async with two_replicas(checkpoint, fault_injection="step=sleep:0.03") as client:
        seen: dict[str, list[int]] = {}

        async def one(request: EngineRequest) -> list[int]:
            tokens = seen[request.request_id] = []
            async for output in client.submit(request):
                tokens += output.new_token_ids
            return tokens

        tasks = {request.request_id: asyncio.create_task(one(request)) for request in requests}
        await wait_until_async(lambda: sum(map(bool, seen.values())) == len(requests))
        survivors = {engine_id.partition("#")[0] for engine_id in client.replicas[0]._collectors}
        assert 0 < len(survivors) < len(requests)
        late = requests_of(16, max_tokens=20)[14:]
        killed = client.replicas[1].pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        await wait_until_async(lambda: client.health.state is EngineState.DEGRADED)
        assert "engine replica 1" in str(client.health.cause)
        # Whoever comes now is served by the other.
        assert [len(await run(client, request)) for request in late] == [20, 20]
        assert {name: await task for name, task in tasks.items()} == expected
        await wait_until_async(lambda: client.health.state is EngineState.READY)
        assert client.replicas[1].pid not in (None, killed)
        again = await run_all(client, requests, at_once=14)
        assert again == expected
        assert client.health.transitions["ready", "degraded"] == client.health.transitions["degraded", "ready"] == 1
        assert all(replica.stats.num_scheduled_tokens for replica in client.replicas)


@pytest.mark.slow
async def test_requests_that_waited_in_a_killed_replica_are_served_by_the_other(checkpoint: Path) -> None:
    requests = requests_of(12, max_tokens=20)
    expected = answers_of_one(checkpoint, requests)
    async with two_replicas(checkpoint, engine_stall_timeout_seconds=300) as client:
        victim = client.replicas[1]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGSTOP)  # so that nothing of what it is sent gets a token
        tasks = {request.request_id: asyncio.create_task(run(client, request)) for request in requests}
        await wait_until_async(
            lambda: (
                0 < victim.num_requests == sum(not task.done() for task in tasks.values())
            )  # the other has ended all
        )
        os.kill(victim.pid, signal.SIGKILL)
        assert {name: await task for name, task in tasks.items()} == expected
