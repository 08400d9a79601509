"""An engine that slept gives the tokens that it would have given, and meanwhile gives back its memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import psutil
import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.process_client import ProcessEngineClient
from pagoda.engine.health import EngineState
from pagoda.errors import ConfigError, EngineNotReadyError
from pagoda.models.dummy import DummySpec
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from tests.support.checkpoints import shared_checkpoint

MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return shared_checkpoint(DummySpec(num_layers=2, max_position_embeddings=512))


def request(name: str, max_tokens: int = 24) -> EngineRequest:
    params = SamplingParams(temperature=0.8, seed=5, ignore_eos=True)
    return EngineRequest(request_id=name, prompt_token_ids=list(range(3, 43)), params=params, max_tokens=max_tokens)


async def tokens(client: ProcessEngineClient, name: str, max_tokens: int = 24) -> list[int]:
    return [token async for output in client.submit(request(name, max_tokens)) for token in output.new_token_ids]


def memory(client: ProcessEngineClient) -> int:
    """Of the engine's process and its ranks, in bytes."""
    assert client.pid is not None
    core = psutil.Process(client.pid)
    return sum(process.memory_info().rss for process in (core, *core.children(recursive=True)))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="one rank"),
        pytest.param({"tensor_parallel_size": 2, "kv_cache_memory_bytes": 64 * MIB}, id="two ranks"),
        pytest.param(
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}, "quantization": "int8"},
            id="int8 with drafts",
        ),
    ],
)
async def test_its_memory_goes_and_comes_back_and_its_tokens_are_the_same(
    checkpoint: Path, fields: dict[str, Any]
) -> None:
    values = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256, "threads": 1}
    values |= {"kv_cache_memory_bytes": 256 * MIB, **fields}
    client = ProcessEngineClient(PagodaConfig(model=str(checkpoint), device="cpu", **values))
    await client.start()
    try:
        expected = await tokens(client, "before")
        awake = memory(client)
        for level in (1, 2):
            await client.sleep(level)
            assert (client.health.state, client.sleep_level) == (EngineState.SLEEPING, level)
            with pytest.raises(EngineNotReadyError):
                await tokens(client, "asleep")
            if not fields:
                # Nine tenths of the KV cache, whose pages may not all have been taken yet, and of weights.
                assert memory(client) < awake
            await asyncio.gather(client.wake_up(), client.wake_up())
            assert (client.health.state, client.sleep_level) == (EngineState.READY, 0)
            assert await tokens(client, f"after {level}") == expected
        assert client.health.transitions["ready", "starting"] == 0  # it did not fail
    finally:
        await client.shutdown()


async def test_it_sleeps_when_it_is_idle_and_takes_settings_between_two_steps(checkpoint: Path) -> None:
    values: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256, "threads": 1}
    client = ProcessEngineClient(PagodaConfig(model=str(checkpoint), device="cpu", **values))
    await client.start()
    try:
        expected = await tokens(client, "alone", 100)
        running = [asyncio.create_task(tokens(client, str(index), 100)) for index in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(EngineNotReadyError, match="sleeps when it is idle"):
            await client.sleep(1)
        await client.reconfigure({"max_num_seqs": 1, "max_num_batched_tokens": 8, "log_level": "warning"})
        with pytest.raises(ConfigError, match="max_num_seqs=5: must be at most 4"):
            await client.reconfigure({"max_num_seqs": 5, "max_num_batched_tokens": 64})
        assert await asyncio.gather(*running) == [expected] * 4
        await client.reconfigure({"max_num_seqs": None, "max_num_batched_tokens": None})
        assert await tokens(client, "end", 100) == expected
    finally:
        await client.shutdown()


async def test_an_engine_that_is_killed_in_its_sleep_is_restarted_awake(checkpoint: Path) -> None:
    values: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "max_model_len": 256, "threads": 1}
    client = ProcessEngineClient(PagodaConfig(model=str(checkpoint), device="cpu", **values))
    await client.start()
    try:
        expected = await tokens(client, "before")
        await client.sleep(1)
        assert client.pid is not None
        psutil.Process(client.pid).kill()
        while client.health.state is EngineState.SLEEPING:
            await asyncio.sleep(0.01)
        await client.wake_up()  # waits for the next one
        assert client.sleep_level == 0
        assert await tokens(client, "after") == expected
        await client.unload("a test")
        assert client.health.state is EngineState.UNLOADED
        await client.start()
        assert await tokens(client, "again") == expected
    finally:
        await client.shutdown()
