"""What every protocol asks of the text layer: jobs in, chunks or sequences out, under one admission and one deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from pagoda.errors import DeadlineExceededError, EngineNotReadyError, InvalidRequestError
from pagoda.request import GenerationRequest
from pagoda.sampling.params import SamplingParams
from pagoda.serving.auth.api_keys import caller_var
from pagoda.serving.interruptible_wait import InterruptibleWait
from pagoda.serving.rate_limits import RateLimiter
from pagoda.text.output import CompletionOutput, GenerationChunk
from pagoda.text.streams import cancelling, merge_streams

if TYPE_CHECKING:
    from pagoda.serving.health import ServerHealth
    from pagoda.text.generation import TextGenerator

MAX_SEQUENCES_PER_REQUEST = 512
MAX_PARAMETER_IDS_PER_REQUEST = 2**20
"""Each sequence has its own in the engine: 512 prompts with a vocabulary of allowed_token_ids would be gigabytes."""


class RequestObserver(Protocol):
    """Sees one job go by, for the metrics."""

    def on_chunk(self, chunk: GenerationChunk) -> None:
        """A piece came."""

    def on_end(self, error: BaseException | None) -> None:
        """The job is over: None when every sequence finished, `CancelledError`/`GeneratorExit` when the client left."""


ObserverFactory = Callable[[GenerationRequest, float], RequestObserver]
"""Makes the observer of a job; the second argument is its arrival, in `time.monotonic()` seconds."""


def check_cost(params: SamplingParams, num_prompts: int) -> None:
    """Refuse a request of so many prompts that asks for more sequences, or ids of parameters in all of them, than any may.

    To be called before its jobs are made.
    """
    count = num_prompts * params.n
    if count > MAX_SEQUENCES_PER_REQUEST:
        raise InvalidRequestError(
            f"the request asks for {count} sequences (prompts times n); at most {MAX_SEQUENCES_PER_REQUEST} are allowed"
        )
    num_ids = count * params.num_ids
    if count > 1 and num_ids > MAX_PARAMETER_IDS_PER_REQUEST:
        raise InvalidRequestError(
            f"the request has {params.num_ids} ids in logit_bias, allowed_token_ids and stop_token_ids for each of {count} "
            f"sequences; at most {MAX_PARAMETER_IDS_PER_REQUEST} in all of them are allowed"
        )


def _of_caller(job: GenerationRequest, request_id: str) -> GenerationRequest:
    """`job` as its caller's: cached prefixes are the tenant's own, for who sees what is cached sees what others asked."""
    caller = caller_var.get()
    tenant = caller.tenant
    cache_keys = (f"tenant={tenant}", *job.cache_keys) if tenant else job.cache_keys
    weight = caller.limits.weight
    return replace(job, request_id=request_id, tenant=tenant, tenant_weight=weight, cache_keys=cache_keys)


def _num_new_tokens(chunk: GenerationChunk) -> int:
    """Tokens that were computed for a chunk; those of the prompt once, for all of its sequences."""
    num_prompt_tokens = chunk.num_prompt_tokens if chunk.index == 0 else None
    return (num_prompt_tokens or 0) + len(chunk.token_ids)


def limit_time(job: GenerationRequest, seconds: float | None) -> GenerationRequest:
    """`job` with at most `seconds` to live; None changes nothing."""
    own = job.timeout_seconds
    if seconds is None or (own is not None and own <= seconds):
        return job
    return replace(job, timeout_seconds=seconds)


class GenerationRunner:
    """Runs the jobs of all protocols, and counts those that are running.

    A job is refused unless `health` is ready. `request_timeout_seconds` bounds every job; a shorter `timeout_seconds` of its
    own wins. The generator comes with `attach` where it can be made only when the checkpoint is there. `rate_limits`: what of
    requests and tokens a minute each tenant has left.
    """

    def __init__(
        self,
        generator: TextGenerator | None,
        health: ServerHealth,
        *,
        request_timeout_seconds: float | None,
        observe: ObserverFactory,
    ) -> None:
        self._generator = generator
        self._health = health
        self._request_timeout_seconds = request_timeout_seconds
        self._observe = observe
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._waits: set[InterruptibleWait] = set()
        self._is_stopped = False
        self.rate_limits = RateLimiter()

    @property
    def generator(self) -> TextGenerator:
        """The text layer; raises `EngineNotReadyError` before it is there."""
        if self._generator is None:
            raise EngineNotReadyError("the model is loading")
        return self._generator

    def attach(self, generator: TextGenerator) -> None:
        """Use `generator` from now on."""
        self._generator = generator

    @property
    def num_running(self) -> int:
        """Jobs between their first and last step here."""
        return self._num_running

    async def wait_until_idle(self) -> None:
        """Return once no job is running."""
        await self._idle.wait()

    def stop(self) -> None:
        """Abort every running job with `EngineNotReadyError`: the server's grace period is over."""
        self._is_stopped = True
        for wait in list(self._waits):
            wait.interrupt(_stopped)

    async def stream(
        self, job: GenerationRequest, request_id: str, *, is_request: bool = True
    ) -> AsyncGenerator[GenerationChunk, None]:
        """The chunks of a job as they come. Close the iterator (or cancel its reader) to abort the job in the engine.

        `is_request`: it counts as a request of its caller. Raises what `TextGenerator.generate` raises, and before that what
        `ServerHealth.check_ready` and `RateLimiter.admit` do.
        """
        self._health.check_ready()
        caller = caller_var.get()
        if is_request:
            self.rate_limits.admit(caller.tenant, caller.limits)
        counts_tokens = caller.limits.tokens_per_minute is not None
        arrival = time.monotonic()
        observer = self._observe(job, arrival)
        self._num_running += 1
        self._idle.clear()
        wait = InterruptibleWait()
        timer = self._bound(wait, self._deadline(job, arrival))
        error: BaseException | None = None
        try:
            chunks = self.generator.generate(_of_caller(job, request_id))
            async with aclosing(chunks):
                while True:
                    try:
                        chunk = await wait.run(anext(chunks))
                    except StopAsyncIteration:
                        break
                    observer.on_chunk(chunk)
                    if counts_tokens:
                        self.rate_limits.count_tokens(caller.tenant, caller.limits, _num_new_tokens(chunk))
                    yield chunk
        except BaseException as caught:  # raised on: a disconnect is an end that is counted, too
            error = caught
            raise
        finally:
            self._waits.discard(wait)
            if timer is not None:
                timer.cancel()
            self._num_running -= 1
            if self._num_running == 0:
                self._idle.set()
            observer.on_end(error)
            del error  # it holds this frame through its traceback, and would be held by it

    async def collect(
        self, job: GenerationRequest, request_id: str, *, is_request: bool = True
    ) -> list[CompletionOutput]:
        """The `params.n` finished sequences of a job, in order of their index."""
        results = [CompletionOutput(index=index) for index in range(job.params.n)]
        async with aclosing(self.stream(job, request_id, is_request=is_request)) as chunks:
            async for chunk in chunks:
                results[chunk.index].add(chunk)
        return results

    async def collect_all(self, jobs: Sequence[GenerationRequest], request_id: str) -> list[list[CompletionOutput]]:
        """The results of all jobs, side by side; the first error aborts the others and is raised."""
        if len(jobs) == 1:
            return [await self.collect(jobs[0], request_id)]
        tasks: list[asyncio.Task[list[CompletionOutput]]] = []
        try:
            async with cancelling(tasks):
                for index, job in enumerate(jobs):
                    part = self.collect(job, f"{request_id}-{index}", is_request=index == 0)
                    tasks.append(asyncio.create_task(part))
                    await asyncio.sleep(0)  # each begins in a turn of the loop of its own: they may have much to do
                return await asyncio.gather(*tasks)
        finally:
            del tasks  # their errors hold this frame through their tracebacks

    def stream_all(
        self, jobs: Sequence[GenerationRequest], request_id: str
    ) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        """`(job index, chunk)` of all jobs as they come; the first error aborts the others and is raised.

        Each job is read one chunk ahead at most, so that a slow reader holds back what is buffered here.
        """
        if len(jobs) == 1:
            return self._stream_only(jobs[0], request_id)
        return merge_streams(
            [self.stream(job, f"{request_id}-{index}", is_request=index == 0) for index, job in enumerate(jobs)]
        )

    async def _stream_only(
        self, job: GenerationRequest, request_id: str
    ) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        async with aclosing(self.stream(job, request_id)) as chunks:
            async for chunk in chunks:
                yield 0, chunk

    def _deadline(self, job: GenerationRequest, arrival: float) -> float | None:
        limits = [seconds for seconds in (self._request_timeout_seconds, job.timeout_seconds) if seconds]
        return arrival + min(limits) if limits else None

    def _bound(self, wait: InterruptibleWait, deadline: float | None) -> asyncio.TimerHandle | None:
        """Have `wait` end when the server stops and at `deadline`, for which a timer is returned: tokenization that hangs is
        bounded too. Where the deadline is past, or there is none, there is no timer.
        """
        self._waits.add(wait)
        if self._is_stopped:
            wait.interrupt(_stopped)
        if deadline is None:
            return None
        remaining = deadline - time.monotonic()
        if remaining > 0:
            return asyncio.get_running_loop().call_later(remaining, wait.interrupt, _deadline_exceeded)
        wait.interrupt(_deadline_exceeded)
        return None


def _stopped() -> EngineNotReadyError:
    return EngineNotReadyError("the server shut down before the request was finished; send it to another replica")


def _deadline_exceeded() -> DeadlineExceededError:
    return DeadlineExceededError("the request's deadline passed before it was finished")
