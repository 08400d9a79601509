"""Jobs end by their deadline, by the server's end, or by their own; and what ran below them is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from pagoda.errors import DeadlineExceededError, EngineNotReadyError
from pagoda.request import GenerationRequest
from pagoda.serving.interruptible_wait import InterruptibleWait
from pagoda.text.output import GenerationChunk
from tests.support.jobs import AnyNumber, job, runner_of
from tests.support.virtual_time import in_virtual_time


class Endless:
    """A generator that gives a token every `seconds`, for ever."""

    client = AnyNumber()

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.num_started = self.num_closed = 0

    async def generate(
        self, request: GenerationRequest, places: object = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        self.num_started += 1
        try:
            while True:
                await asyncio.sleep(self.seconds)
                yield GenerationChunk(text="x", token_ids=[1])
        finally:
            self.num_closed += 1


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
    wait = InterruptibleWait()
    task = asyncio.create_task(wait.run(asyncio.sleep(100)))
    await asyncio.sleep(0)
    wait.interrupt(lambda: DeadlineExceededError("late"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@in_virtual_time
async def test_an_interrupted_wait_leaves_its_task_uncancelled() -> None:
    wait = InterruptibleWait()

    async def reader() -> float:
        with pytest.raises(DeadlineExceededError):
            await wait.run(asyncio.sleep(100))
        started = asyncio.get_running_loop().time()
        await asyncio.sleep(10.0)
        return asyncio.get_running_loop().time() - started

    task = asyncio.create_task(reader())
    await asyncio.sleep(0)
    wait.interrupt(lambda: DeadlineExceededError("late"))
    assert await task == pytest.approx(10.0)
