"""A request outlives its engine: it goes on in the next one, and its tokens are those of an engine that does not fail."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.process_client import ProcessEngineClient
from pagoda.errors import EngineDeadError
from pagoda.models.dummy import DummySpec
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason, TokenLogprobs
from pagoda.sampling.params import SamplingParams
from tests.support.checkpoints import shared_checkpoint
from tests.support.waiting import wait_until_async

MAX_TOKENS = 100
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 7, "top_p": 0.9},
    "penalties": {"temperature": 0.7, "seed": 1, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    "logprobs": {"temperature": 0.8, "seed": 3, "logprobs": 3, "prompt_logprobs": 1},
    "min_tokens": {"temperature": 0.0, "min_tokens": 60, "stop_token_ids": tuple(range(400)), "ignore_eos": False},
}


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return shared_checkpoint(DummySpec(num_layers=2, max_position_embeddings=512))


@asynccontextmanager
async def engine(checkpoint: Path, **fields: Any) -> AsyncIterator[ProcessEngineClient]:
    values = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256, "threads": 1} | fields
    client = ProcessEngineClient(PagodaConfig(model=str(checkpoint), device="cpu", **values))
    await client.start()
    try:
        yield client
    finally:
        await client.shutdown()


def request(name: str) -> EngineRequest:
    params = SamplingParams(**{"ignore_eos": True, **KINDS[name]})
    prompt = [3 + (len(name) * (index + 7)) % 400 for index in range(40)]
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=params, max_tokens=MAX_TOKENS)


class Answer:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.num_prompt_logprobs = 0
        self.reason: FinishReason | None = None

    async def read(self, client: ProcessEngineClient, what: EngineRequest) -> Answer:
        async for output in client.submit(what):
            assert self.reason is None, "nothing comes after the end"
            self.tokens += output.new_token_ids
            self.logprobs += output.logprobs or []
            self.num_prompt_logprobs += len(output.prompt_logprobs or [])
            self.reason = output.finish_reason
        return self

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)


async def answers(client: ProcessEngineClient) -> dict[str, Answer]:
    read = await asyncio.gather(*(Answer().read(client, request(name)) for name in KINDS))
    return dict(zip(KINDS, read, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"speculative_config": {"method": "ngram"}}, id="drafts"),
        pytest.param({}, id="plain", marks=pytest.mark.slow),
    ],
)
async def test_killed_twice_every_request_has_the_tokens_that_it_would_have_had(
    checkpoint: Path, settings: dict[str, Any]
) -> None:
    faults = {"fault_injection": "step=sleep:0.01"}  # so that all of them are running when it is killed
    async with engine(checkpoint, max_engine_restarts=9, **settings, **faults) as client:
        expected = await answers(client)
        running = {name: Answer() for name in KINDS}
        tasks = [asyncio.create_task(running[name].read(client, request(name))) for name in KINDS]
        for least in (10, 40):
            await wait_until_async(lambda least=least: max(len(one.tokens) for one in running.values()) > least)  # type: ignore[misc]
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            await wait_until_async(lambda: not client.health.accepts_requests)
            await wait_until_async(lambda: client.health.accepts_requests, seconds=30)
        await asyncio.gather(*tasks)
        assert running == expected
        assert client.num_replays >= 2 * 4
        await wait_until_async(lambda: client.stats.num_running == 0 and client.stats.num_blocks_in_use == 0)


async def test_a_request_that_makes_engines_fail_takes_two_of_them_and_is_named(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with engine(checkpoint, max_engine_restarts=9, fault_injection="prepare@poison=exit") as client:
        waiting = [asyncio.create_task(Answer().read(client, request(name))) for name in ("greedy", "seeded")]
        poison = replace(request("greedy"), request_id="poison")
        with pytest.raises(EngineDeadError, match="send it again"):
            await Answer().read(client, poison)
        assert "request poison was running in 2 engines that failed" in caplog.text
        await asyncio.gather(*waiting, return_exceptions=True)  # they may have been beside it twice
        await wait_until_async(lambda: client.health.accepts_requests, seconds=30)
        assert (await Answer().read(client, request("greedy"))).reason is FinishReason.LENGTH


async def test_a_client_that_leaves_while_there_is_no_engine_leaves_nothing(checkpoint: Path) -> None:
    async with engine(checkpoint, fault_injection="step=sleep:0.01") as client:
        task = asyncio.create_task(Answer().read(client, request("greedy")))
        await wait_until_async(lambda: client.stats.num_running == 1)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await wait_until_async(lambda: not client.health.accepts_requests)
        task.cancel()
        await asyncio.wait([task])
        assert client.num_requests == 0


async def test_a_spare_process_is_the_next_core(checkpoint: Path) -> None:
    async with engine(checkpoint, spare_process_seconds=0) as client:
        await wait_until_async(lambda: client._launched is not None)
        assert client._launched is not None
        spare = client._launched.process.pid
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await wait_until_async(lambda: client.pid == spare, seconds=30)
        await wait_until_async(lambda: client.health.accepts_requests, seconds=30)
