"""Jobs end by their deadline, by the server's end, or by their own; and what ran below them is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import cast

import pytest

from pagoda.errors import DeadlineExceededError, EngineNotReadyError
from pagoda.request import GenerationRequest
from pagoda.sampling.params import SamplingParams
from pagoda.serving.generation import GenerationRunner
from pagoda.serving.health import ServerHealth
from pagoda.serving.interruptible_wait import BoundedWait
from pagoda.text.generation import TextGenerator
from pagoda.text.output import GenerationChunk
from tests.support.virtual_time import in_virtual_time


class Ready:
    def check_ready(self) -> None:
        pass


class Observer:
    def on_chunk(self, chunk: GenerationChunk) -> None:
        pass

    def on_end(self, error: BaseException | None) -> None:
        pass


class Endless:
    """A generator that gives a token every `seconds`, for ever."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.num_started = self.num_closed = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        self.num_started += 1
        try:
            while True:
                await asyncio.sleep(self.seconds)
                yield GenerationChunk(text="x", token_ids=[1])
        finally:
            self.num_closed += 1


def runner_of(generator: Endless) -> GenerationRunner:
    return GenerationRunner(
        cast("TextGenerator", generator),
        cast("ServerHealth", Ready()),
        request_timeout_seconds=None,
        observe=lambda job, arrival: Observer(),
    )


def job(seconds: float | None = None) -> GenerationRequest:
    return GenerationRequest(prompt="x", params=SamplingParams(), timeout_seconds=seconds)


@pytest.mark.parametrize("seconds_per_token", [1.0, 1e6])
@in_virtual_time
async def test_a_deadline_ends_a_job_between_tokens_and_before_the_first(seconds_per_token: float) -> None:
    generator = Endless(seconds_per_token)
    runner = runner_of(generator)
    with pytest.raises(DeadlineExceededError):
        await runner.collect(job(10.5), "r")
    assert (generator.num_closed, runner.num_running) == (1, 0)


@in_virtual_time
async def test_a_deadline_that_has_passed_starts_nothing() -> None:
    generator = Endless(0.01)
    with pytest.raises(DeadlineExceededError):
        await runner_of(generator).collect(job(1e-9), "r")
    assert generator.num_started == 0


@in_virtual_time
async def test_a_deadline_does_not_strike_a_reader_that_is_busy_elsewhere() -> None:
    """The reader's own waits are not cancelled; it hears of the deadline when it comes back for more."""
    stream = runner_of(Endless(0.0)).stream(job(1000.0), "r")
    await anext(stream)
    await asyncio.sleep(1001.0)
    with pytest.raises(DeadlineExceededError):
        await anext(stream)


@in_virtual_time
async def test_stopping_ends_all_jobs_and_those_to_come() -> None:
    generator = Endless(100.0)
    runner = runner_of(generator)
    running = [asyncio.create_task(runner.collect(job(), f"r-{index}")) for index in range(3)]
    await asyncio.sleep(1.0)
    runner.stop()
    for task in [*running, asyncio.create_task(runner.collect(job(), "late"))]:
        with pytest.raises(EngineNotReadyError):
            await task
    assert (generator.num_started, generator.num_closed) == (3, 3)


@in_virtual_time
async def test_a_cancelled_reader_stays_cancelled_when_its_deadline_comes_at_the_same_time() -> None:
    wait = BoundedWait()
    task = asyncio.create_task(wait.run(asyncio.sleep(100)))
    await asyncio.sleep(0)
    wait.interrupt(DeadlineExceededError("late"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@in_virtual_time
async def test_an_interrupted_wait_leaves_its_task_uncancelled() -> None:
    wait = BoundedWait()

    async def reader() -> float:
        with pytest.raises(DeadlineExceededError):
            await wait.run(asyncio.sleep(100))
        started = asyncio.get_running_loop().time()
        await asyncio.sleep(10.0)
        return asyncio.get_running_loop().time() - started

    task = asyncio.create_task(reader())
    await asyncio.sleep(0)
    wait.interrupt(DeadlineExceededError("late"))
    assert await task == pytest.approx(10.0)
