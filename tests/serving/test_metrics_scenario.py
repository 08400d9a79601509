"""Metrics of a whole server over the fake engine: after a scripted day every count is exact and every gauge is zero."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pagoda.config.schema import PagodaConfig
from pagoda.errors import ErrorKind, InvalidRequestError, QueueFullError
from pagoda.request import GenerationRequest
from pagoda.serving.build import make_context
from pagoda.serving.context import ServingContext
from pagoda.text.generation import TextGenerator
from pagoda.text.pool import TokenizerPool
from tests.support.checkpoints import shared_checkpoint
from tests.support.fake_engine import FakeEngineClient
from tests.support.waiting import wait_until_async

PROMPT = [5, 6, 7]
MAX_MODEL_LEN = 20


@pytest.fixture
async def context() -> AsyncIterator[ServingContext]:
    config = PagodaConfig(model=str(shared_checkpoint()), model_name="demo", tokenizer_pool_size=1)
    engine = FakeEngineClient(max_model_len=MAX_MODEL_LEN)
    made = make_context(config, engine)
    pool = TokenizerPool.from_config(config)
    await pool.start()
    await engine.start()
    made.models.default.runner.attach(TextGenerator.from_config(engine, pool, config))
    made.models.default.health.text_is_ready()
    yield made
    await pool.shutdown()


def engine_of(context: ServingContext) -> FakeEngineClient:
    assert isinstance(context.models.default.client, FakeEngineClient)
    return context.models.default.client


async def run(context: ServingContext, prompt: str | list[int] = PROMPT, **options: Any) -> None:
    timeout = options.pop("timeout_seconds", None)
    sampling = context.models.default.generator.sampling_params(options)
    job = GenerationRequest(prompt=prompt, params=sampling, timeout_seconds=timeout)
    await context.models.default.runner.collect(job, f"r-{id(job)}")


def figures(context: ServingContext) -> dict[str, float]:
    body = context.metrics.render()[0].decode()
    found = {}
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            labels = ",".join(value for name, value in sorted(sample.labels.items()) if name != "model_name")
            found[sample.name.removeprefix("pagoda_") + (f"[{labels}]" if labels else "")] = sample.value
    return found


async def test_every_way_to_end_is_counted_once_and_nothing_is_left(context: ServingContext) -> None:
    engine = engine_of(context)
    await run(context, max_tokens=4)
    await run(context)  # ends at the model's limit
    await run(context, max_tokens=9, stop_token_ids=[6])
    await run(context, max_tokens=2, n=3)
    (letter,) = set(await context.models.default.generator.pool.decode([PROMPT[0]]))
    await run(context, max_tokens=9, stop=[letter])  # for the engine an abort, for the client a stop

    engine.hold.clear()
    leaving = asyncio.create_task(run(context, max_tokens=5, n=2))
    await wait_until_async(lambda: len(engine.submitted) == 9)
    during = figures(context)
    assert during["num_requests_running"] == 2
    leaving.cancel()
    with suppress(asyncio.CancelledError):
        await leaving
    with pytest.raises(Exception, match="deadline"):
        await run(context, max_tokens=5, timeout_seconds=0.05)
    engine.hold.set()

    engine.fail_after = (2, ErrorKind.ENGINE_DEAD)
    with pytest.raises(Exception, match="failed as asked"):
        await run(context, max_tokens=5)
    engine.fail_after = None
    engine.max_requests = 0
    with pytest.raises(QueueFullError):
        await run(context, max_tokens=5)
    engine.max_requests = None
    with pytest.raises(InvalidRequestError):
        await run(context, list(range(MAX_MODEL_LEN + 1)), max_tokens=5)

    found = figures(context)
    expected = {
        "request_success_total[length]": 1 + 1 + 3,
        "request_success_total[stop]": 1 + 1,
        "request_success_total[abort]": 2 + 1,
        "request_success_total[error]": 1,
        "request_aborts_total[client]": 2,
        "request_aborts_total[deadline]": 1,
        "prompt_tokens_total": 3 * 8,
        "generation_tokens_total": 4 + (MAX_MODEL_LEN - 3) + 2 + 3 * 2 + 1 + 2,
        "e2e_request_latency_seconds_count": 11,
        "request_generation_tokens_count": 11,
        "request_prompt_tokens_count": 8,
        "time_to_first_token_seconds_count": 8,
        "request_params_max_tokens_count": 10,
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "kv_cache_usage_perc": 0,
        "engine_state[ready]": 1,
    }
    assert {name: found[name] for name in expected} == expected
    assert context.models.default.runner.num_running == 0


async def test_a_slow_reader_that_closes_early_is_one_abort(context: ServingContext) -> None:
    job = GenerationRequest(prompt=PROMPT, params=context.models.default.generator.sampling_params({"max_tokens": 9}))
    async with aclosing(context.models.default.runner.stream(job, "r")) as chunks:
        async for _ in chunks:
            break
    found = figures(context)
    assert found["request_success_total[abort]"] == 1
    assert found["request_aborts_total[client]"] == 1
    assert engine_of(context).aborted == [engine_of(context).submitted[0].request_id]
