"""Jobs end by their deadline, by the server's end, or by their own; and what ran below them is closed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest

from pagoda.errors import DeadlineExceededError, EngineNotReadyError
from pagoda.request import GenerationRequest
from pagoda.serving.interruptible_wait import InterruptibleWait
from pagoda.text.output import GenerationChunk
from tests.support.jobs import job, runner_of


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


@pytest.mark.parametrize("seconds_per_token", [0.01, 100.0])
async def test_a_deadline_ends_a_job_between_tokens_and_before_the_first(seconds_per_token: float) -> None:
    generator = Endless(seconds_per_token)
    runner = runner_of(generator)
    with pytest.raises(DeadlineExceededError):
        await asyncio.wait_for(runner.collect(job(0.1), "r"), 30)
    assert (generator.num_closed, runner.num_running) == (1, 0)


async def test_a_deadline_that_has_passed_starts_nothing() -> None:
    generator = Endless(0.01)
    with pytest.raises(DeadlineExceededError):
        await runner_of(generator).collect(job(1e-9), "r")
    assert generator.num_started == 0


async def test_a_deadline_does_not_strike_a_reader_that_is_busy_elsewhere() -> None:
    """The reader's own waits are not cancelled; it hears of the deadline when it comes back for more."""
    stream = runner_of(Endless(0.0)).stream(job(0.05), "r")
    await anext(stream)
    await asyncio.sleep(0.2)
    with pytest.raises(DeadlineExceededError):
        await anext(stream)


async def test_stopping_ends_all_jobs_and_those_to_come() -> None:
    generator = Endless(100.0)
    runner = runner_of(generator)
    running = [asyncio.create_task(runner.collect(job(), f"r-{index}")) for index in range(3)]
    await asyncio.sleep(0.05)
    runner.stop()
    for task in [*running, asyncio.create_task(runner.collect(job(), "late"))]:
        with pytest.raises(EngineNotReadyError):
            await asyncio.wait_for(task, 30)
    assert (generator.num_started, generator.num_closed) == (3, 3)


async def test_a_cancelled_reader_stays_cancelled_when_its_deadline_comes_at_the_same_time() -> None:
    wait = InterruptibleWait()
    task = asyncio.create_task(wait.run(asyncio.sleep(100)))
    await asyncio.sleep(0)
    wait.interrupt(lambda: DeadlineExceededError("late"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_interrupted_wait_leaves_its_task_uncancelled() -> None:
    wait = InterruptibleWait()

    async def reader() -> float:
        with pytest.raises(DeadlineExceededError):
            await wait.run(asyncio.sleep(100))
        started = time.monotonic()
        await asyncio.sleep(0.01)
        return time.monotonic() - started

    task = asyncio.create_task(reader())
    await asyncio.sleep(0)
    wait.interrupt(lambda: DeadlineExceededError("late"))
    assert await task >= 0.005
