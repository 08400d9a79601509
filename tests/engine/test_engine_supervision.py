"""The engine's process is looked after: honest work is let be, a fault of one request is its own, no end is missed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.core_handle import EngineCoreHandle
from pagoda.engine.client.prelaunch import PrelaunchedProcess
from pagoda.engine.client.process_client import ProcessEngineClient
from pagoda.engine.health import EngineState
from pagoda.errors import EngineDeadError, QueueFullError, RequestFailedError
from pagoda.models.dummy import DummySpec
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from tests.support.checkpoints import shared_checkpoint
from tests.support.waiting import wait_until_async


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return shared_checkpoint(DummySpec(num_layers=2, max_position_embeddings=2048))


@asynccontextmanager
async def engine(
    checkpoint: Path, launched: PrelaunchedProcess | None = None, **fields
) -> AsyncIterator[ProcessEngineClient]:
    values = {"max_num_seqs": 16, "max_num_batched_tokens": 2048, "max_model_len": 2000, "threads": 1} | fields
    client = ProcessEngineClient(PagodaConfig(model=str(checkpoint), device="cpu", **values), launched=launched)
    await client.start()
    try:
        yield client
    finally:
        await client.shutdown()


def request(request_id: str, num_tokens: int = 5, max_tokens: int = 4) -> EngineRequest:
    prompt = [3 + (len(request_id) * (index + 7)) % 400 for index in range(num_tokens)]
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=sampling, max_tokens=max_tokens)


async def run(client: ProcessEngineClient, what: EngineRequest) -> FinishReason | None:
    reason = None
    async for output in client.submit(what):
        reason = output.finish_reason
    return reason


async def test_an_honest_long_step_is_given_its_time(checkpoint: Path) -> None:
    # 1536 tokens in one step have 2 s * 1536 / 512.
    faults = "prepare@long=sleep:4"
    async with engine(checkpoint, engine_stall_timeout_seconds=2, fault_injection=faults) as client:
        core = client.pid
        assert await run(client, request("long", num_tokens=1536)) is FinishReason.LENGTH
        assert client.pid == core
        assert client.health.transitions == {("starting", "ready"): 1}


async def test_a_process_that_was_launched_before_is_the_first_core_and_no_later_one(checkpoint: Path) -> None:
    with PrelaunchedProcess() as launched:
        async with engine(checkpoint, launched, max_engine_restarts=1) as client:
            assert client.pid == launched.process.pid
            assert await run(client, request("first")) is FinishReason.LENGTH
            os.kill(launched.process.pid, signal.SIGKILL)
            await wait_until_async(lambda: client.health.transitions.get(("starting", "ready")) == 2)
            assert client.pid != launched.process.pid


async def test_a_request_that_the_core_cannot_read_fails_alone(checkpoint: Path) -> None:
    async with engine(checkpoint) as client:
        core = client.pid
        good = asyncio.create_task(run(client, request("good", max_tokens=100)))
        with pytest.raises(RequestFailedError, match="could not be read"):
            await run(client, replace(request("bad"), max_tokens=None))  # type: ignore[arg-type]
        assert await good is FinishReason.LENGTH
        assert client.pid == core


async def test_a_core_that_cannot_be_started_again_leaves_the_engine_dead(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine(checkpoint, max_engine_restarts=2) as client:

        async def out_of_processes(*_: object, **__: object) -> EngineCoreHandle:
            raise BlockingIOError("no more processes")

        monkeypatch.setattr(EngineCoreHandle, "start", out_of_processes)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await wait_until_async(lambda: client.health.state is EngineState.DEAD)
        assert "no more processes" in str(client.health.cause)
        with pytest.raises(EngineDeadError):
            await run(client, request("late"))


async def test_an_engine_that_is_lost_while_it_drains_is_dead_and_its_requests_end(checkpoint: Path) -> None:
    async with engine(checkpoint, fault_injection="step=sleep:0.05") as client:
        running = asyncio.create_task(run(client, request("r", max_tokens=190)))
        await wait_until_async(lambda: client.stats.num_running == 1)
        client.health.transition(EngineState.DRAINING, "a test")
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            await running
        await wait_until_async(lambda: client.health.state is EngineState.DEAD)
        assert client.pid is None


async def test_an_engine_is_degraded_while_its_steps_are_smaller_than_configured(checkpoint: Path) -> None:
    # The budget is halved once, and grows back after 64 good steps.
    async with engine(checkpoint, fault_injection="step#20=oom") as client:
        assert await run(client, request("r", max_tokens=150)) is FinishReason.LENGTH
        assert client.health.transitions == {
            ("starting", "ready"): 1,
            ("ready", "degraded"): 1,
            ("degraded", "ready"): 1,
        }


async def test_the_time_to_retry_is_what_the_queue_takes_at_the_measured_pace(checkpoint: Path) -> None:
    # A request takes a second at least, and three are waiting.
    settings = {"max_num_seqs": 1, "max_num_waiting": 3, "fault_injection": "step=sleep:0.05"}
    async with engine(checkpoint, **settings) as client:
        await run(client, request("first", max_tokens=20))
        tasks = [asyncio.create_task(run(client, request("r" * n, max_tokens=20))) for n in range(1, 5)]
        await wait_until_async(lambda: client.num_requests == 4)
        with pytest.raises(QueueFullError) as refused:
            await run(client, request("more"))
        assert refused.value.retry_after_seconds >= 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
