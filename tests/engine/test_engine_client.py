"""The engine in a process of its own: every request ends once, whatever happens to the client or to the process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.client.process_client import ProcessEngineClient
from pagoda.engine.health import EngineState
from pagoda.errors import EngineDeadError, EngineNotReadyError, InvalidRequestError, PagodaError, QueueFullError
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from tests.support.waiting import wait_until_async

MAX_MODEL_LEN = 200


@asynccontextmanager
async def engine(checkpoint: Path, **fields) -> AsyncIterator[ProcessEngineClient]:
    values = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "max_model_len": MAX_MODEL_LEN, "threads": 1} | fields
    client = ProcessEngineClient(PagodaConfig(model=str(checkpoint), device="cpu", **values))
    await client.start()
    try:
        yield client
    finally:
        await client.shutdown()


def request(request_id: str, num_tokens: int = 5, max_tokens: int = 12, **fields) -> EngineRequest:
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    seed = sum(map(ord, request_id))
    prompt = [3 + (seed * (index + 7)) % 400 for index in range(num_tokens)]
    return EngineRequest(
        request_id=request_id, prompt_token_ids=prompt, params=sampling, max_tokens=max_tokens, **fields
    )


async def run(client: ProcessEngineClient, what: EngineRequest) -> tuple[list[int], FinishReason | None]:
    tokens: list[int] = []
    reasons = []
    async for output in client.submit(what):
        tokens += output.new_token_ids
        reasons.append(output.finish_reason)
    assert all(reason is None for reason in reasons[:-1]), "news after the end"
    return tokens, reasons[-1]


async def test_three_hundred_requests_each_end_once_in_order_of_arrival(checkpoint: Path) -> None:
    # 24 blocks for up to 16 requests of up to 5 blocks: they queue, and they are preempted.
    async with engine(checkpoint, num_gpu_blocks_override=25, max_model_len=120) as client:
        alone = {name: await run(client, request(name)) for name in ("r0", "r7", "r299")}
        ended: list[int] = []

        async def one(index: int) -> tuple[list[int], FinishReason | None]:
            result = await run(client, request(f"r{index}", num_tokens=5 + index % 40))
            ended.append(index)
            return result

        results = await asyncio.gather(*(one(index) for index in range(300)))
        assert {reason for _, reason in results} == {FinishReason.LENGTH}
        assert {len(tokens) for tokens, _ in results} == {12}
        assert results[0] == alone["r0"]
        # All have equal lengths of output, so nobody may be overtaken by more than a batch.
        assert max(abs(position - index) for position, index in enumerate(ended)) <= 32
        await wait_until_async(lambda: client.stats.num_running == 0)
        assert (client.stats.num_waiting, client.stats.num_blocks_in_use, client.num_requests) == (0, 0, 0)


async def test_closing_a_stream_frees_its_blocks_and_disturbs_nobody(checkpoint: Path) -> None:
    async with engine(checkpoint, max_num_seqs=2, fault_injection="step=sleep:0.01") as client:
        undisturbed = await run(client, request("other", max_tokens=100))
        other = asyncio.create_task(run(client, request("other", max_tokens=100)))
        async with aclosing(client.submit(request("left", max_tokens=150))) as stream:
            await anext(stream)
        waiting = asyncio.create_task(run(client, request("waiting", max_tokens=150)))
        await asyncio.sleep(0)
        waiting.cancel()
        assert await other == undisturbed
        await wait_until_async(lambda: client.stats.num_blocks_in_use == 0 and client.num_requests == 0)
        # Nothing was computed for those who left that they might have had in the end: 155 tokens each.
        assert client.stats.num_scheduled_tokens < 2 * 104 + 155


async def test_a_request_that_can_never_fit_is_refused_and_the_next_is_served(checkpoint: Path) -> None:
    async with engine(checkpoint) as client:
        with pytest.raises(InvalidRequestError, match="300 tokens"):
            await run(client, request("long", num_tokens=300))
        assert (await run(client, request("good")))[1] is FinishReason.LENGTH


async def test_max_tokens_beyond_the_model_ends_with_length(checkpoint: Path) -> None:
    async with engine(checkpoint) as client:
        tokens, reason = await run(client, request("a", num_tokens=50, max_tokens=10**6))
        assert (len(tokens), reason) == (MAX_MODEL_LEN - 50, FinishReason.LENGTH)


async def test_full_queue_refuses_with_a_time_to_retry(checkpoint: Path) -> None:
    async with engine(checkpoint, max_num_seqs=1, max_num_waiting=2) as client:
        tasks = [asyncio.create_task(run(client, request(f"r{index}", max_tokens=60))) for index in range(3)]
        await wait_until_async(lambda: client.num_requests == 3)
        with pytest.raises(QueueFullError) as refused:
            await run(client, request("more"))
        assert refused.value.retry_after_seconds >= 1
        await asyncio.gather(*tasks)
        assert (await run(client, request("more")))[1] is FinishReason.LENGTH


async def test_a_core_that_does_not_look_at_its_queue_does_not_make_it_longer(checkpoint: Path) -> None:
    async with engine(checkpoint, max_num_seqs=1, max_num_waiting=2) as client:
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        tasks = [asyncio.create_task(run(client, request(f"r{index}"))) for index in range(3)]
        await wait_until_async(lambda: client.num_requests == 3)
        with pytest.raises(QueueFullError):
            await run(client, request("more"))
        os.kill(client.pid, signal.SIGCONT)
        assert [reason for _, reason in await asyncio.gather(*tasks)] == [FinishReason.LENGTH] * 3


async def test_killed_core_fails_its_requests_and_a_new_one_gives_the_same_answers(checkpoint: Path) -> None:
    async with engine(checkpoint, max_request_replays=0) as client:
        before = await run(client, request("a"))
        running = asyncio.create_task(run(client, request("long", max_tokens=190)))
        await wait_until_async(lambda: client.stats.num_running == 1)
        killed = client.pid
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="send it again"):
            await running
        assert not client.health.accepts_requests
        with pytest.raises(EngineNotReadyError):
            await run(client, request("too early"))
        await wait_until_async(lambda: client.health.accepts_requests)
        assert client.pid != killed
        assert await run(client, request("a")) == before


@pytest.mark.parametrize("is_busy", [True, False])
async def test_stopped_core_is_noticed_within_its_bound_busy_or_idle(checkpoint: Path, is_busy: bool) -> None:
    async with engine(checkpoint, engine_stall_timeout_seconds=3) as client:
        expected = await run(client, request("long", max_tokens=190))
        running = asyncio.create_task(run(client, request("long", max_tokens=190))) if is_busy else None
        if is_busy:
            await wait_until_async(lambda: client.stats.num_running == 1)
        os.kill(client.pid, signal.SIGSTOP)
        await wait_until_async(lambda: not client.health.accepts_requests, seconds=10)
        assert "no heartbeat" in str(client.health.cause)
        if running is not None:
            assert await running == expected
        await wait_until_async(lambda: client.health.accepts_requests)
        assert (await run(client, request("a")))[1] is FinishReason.LENGTH


async def test_policy_exit_leaves_the_engine_dead(checkpoint: Path) -> None:
    async with engine(checkpoint, on_engine_failure="exit") as client:
        os.kill(client.pid, signal.SIGKILL)
        await wait_until_async(lambda: client.health.state is EngineState.DEAD)
        assert "SIGKILL" in str(client.health.cause)
        with pytest.raises(EngineDeadError):
            await run(client, request("a"))


async def test_core_that_cannot_start_says_why(checkpoint: Path) -> None:
    with pytest.raises(PagodaError, match=r"max_model_len=100000.*at most 512"):
        async with engine(checkpoint, max_model_len=100000):
            pass


async def test_choices_share_the_kv_of_their_prompt_until_the_cache_is_reset(checkpoint: Path) -> None:
    """All arrive at once; the blocks that one of them computes are found by the others in the same step."""
    num_tokens, num_choices, block_size = 130, 8, 16
    whole_blocks = num_tokens // block_size * block_size

    async def cached_and_computed(
        client: ProcessEngineClient, prompt: EngineRequest, num: int
    ) -> tuple[list[int], int]:
        before = client.stats.num_scheduled_tokens

        async def one(index: int) -> int:
            cached = [
                output.num_cached_tokens async for output in client.submit(replace(prompt, request_id=f"c{index}"))
            ]
            return cached[0] or 0

        cached = await asyncio.gather(*(one(index) for index in range(num)))
        await wait_until_async(lambda: client.stats.num_running == 0)
        return cached, client.stats.num_scheduled_tokens - before

    async with engine(checkpoint, max_num_batched_tokens=512) as client:
        prompt = request("prompt", num_tokens=num_tokens, max_tokens=1)
        cached, computed = await cached_and_computed(client, prompt, num_choices)
        assert cached == [0] + [whole_blocks] * (num_choices - 1)
        assert computed == num_tokens + (num_choices - 1) * (num_tokens - whole_blocks)
        assert (await cached_and_computed(client, prompt, 1))[0] == [whole_blocks]
        client.reset_prefix_cache()
        assert await cached_and_computed(client, prompt, 1) == ([0], num_tokens)
