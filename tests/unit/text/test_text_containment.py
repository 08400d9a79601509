"""A fault while one request's tokens become text, and a reader of several sequences who takes his time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import pytest

from pagoda import faults
from pagoda.config.schema import PagodaConfig
from pagoda.errors import RequestFailedError
from pagoda.request import GenerationRequest
from pagoda.sampling.params import SamplingParams
from pagoda.text.generation import TextGenerator
from pagoda.text.pool import TokenizerPool
from tests.support.checkpoints import shared_checkpoint
from tests.support.fake_engine import FakeEngineClient


@pytest.fixture(autouse=True)
def no_faults_left() -> Iterator[None]:
    yield
    faults.install(None)


@pytest.fixture
async def generator() -> AsyncIterator[TextGenerator]:
    config = PagodaConfig(model=str(shared_checkpoint()), tokenizer_pool_size=1)
    engine = FakeEngineClient()
    await engine.start()
    pool = TokenizerPool.from_config(config)
    await pool.start()
    yield TextGenerator.from_config(engine, pool, config)
    await pool.shutdown()


async def run(generator: TextGenerator, request_id: str) -> list[int]:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    request = GenerationRequest(request_id=request_id, prompt=[20, 21, 22], params=params)
    return [token_id async for chunk in generator.generate(request) for token_id in chunk.token_ids]


@pytest.mark.parametrize("action", ["raise", "oom"])
async def test_tokens_that_cannot_become_text_end_their_request_alone(generator: TextGenerator, action: str) -> None:
    faults.install(f"detokenize@bad#3={action}")
    good, bad = await asyncio.gather(run(generator, "good"), run(generator, "bad"), return_exceptions=True)
    assert good == [20, 21, 22, 20, 21, 22, 20, 21]
    assert isinstance(bad, RequestFailedError)
    assert generator.client.aborted == ["bad"]


async def test_sequences_wait_for_a_reader_who_takes_his_time(generator: TextGenerator) -> None:
    steps: list[int] = []
    submit = generator.client.submit

    async def counted(request, places=None):
        async for output in submit(request, places):
            steps.append(1)
            yield output

    generator.client.submit = counted  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=100, n=3, ignore_eos=True)
    async with aclosing(generator.generate(GenerationRequest(prompt=[20, 21], params=params))) as chunks:
        await anext(chunks)
        for _ in range(200):
            await asyncio.sleep(0)
        # One was read; in the queue is one of each, and each has its next one in hand.
        assert len(steps) <= 1 + 3 + 3
        assert sum([len(chunk.token_ids) async for chunk in chunks]) == 3 * 100 - 1
