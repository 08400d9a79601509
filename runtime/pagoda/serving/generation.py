"""What every protocol asks of the text layer: jobs in, chunks or sequences out, under one admission and one deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from typing_extensions import override

from pagoda.adapters import LoraAdapter
from pagoda.errors import DeadlineExceededError, EngineNotReadyError, InvalidRequestError
from pagoda.request import GenerationRequest, PoolingRequest
from pagoda.sampling.params import SamplingParams
from pagoda.serving.auth.api_keys import caller_var
from pagoda.serving.inference_headers import inference_headers_var
from pagoda.serving.interruptible_wait import InterruptibleWait
from pagoda.serving.rate_limits import RateLimiter
from pagoda.text.output import CompletionOutput, GenerationChunk
from pagoda.text.streams import cancelling, merge_streams

if TYPE_CHECKING:
    from pagoda.engine.client.request_queue import QueuePlaces
    from pagoda.serving.health import ModelHealth
    from pagoda.text.generation import TextGenerator
    from pagoda.text.pooling import TextPooler

MAX_SEQUENCES_PER_REQUEST = 512
MAX_PARAMETER_IDS_PER_REQUEST = 2**20
"""Each sequence has its own in the engine: 512 prompts with a vocabulary of allowed_token_ids would be gigabytes."""


class RequestObserver(Protocol):
    """Sees one job go by, for the metrics."""

    def on_chunk(self, chunk: GenerationChunk) -> None:
        """A piece came."""

    def on_end(self, error: BaseException | None) -> None:
        """The job is over: None when every sequence finished, `CancelledError`/`GeneratorExit` when the client left."""


Job = GenerationRequest | PoolingRequest
AnyJob = TypeVar("AnyJob", GenerationRequest, PoolingRequest)

ObserverFactory = Callable[[Job, float], RequestObserver]
"""Makes the observer of a job, which has its id; the second argument is its arrival, in `time.monotonic()` seconds."""


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


def _of_caller(job: Job, request_id: str) -> Any:
    """`job` as its caller's: cached prefixes are the tenant's own, for who sees what is cached sees what others asked."""
    caller, headers = caller_var.get(), inference_headers_var.get()
    tenant = caller.tenant
    return replace(
        job,
        request_id=request_id,
        tenant=tenant,
        tenant_weight=caller.limits.weight,
        fairness_id=headers.fairness_id,
        priority=job.priority or headers.priority,
        ttft_slo=headers.ttft_slo,
        cache_keys=(f"tenant={tenant}", *job.cache_keys) if tenant else job.cache_keys,
    )


def _num_new_tokens(chunk: GenerationChunk) -> int:
    """Tokens that were computed for a chunk; those of the prompt once, for all of its sequences."""
    num_prompt_tokens = chunk.num_prompt_tokens if chunk.index == 0 else None
    return (num_prompt_tokens or 0) + len(chunk.token_ids)


def limit_time(job: AnyJob, seconds: float | None) -> AnyJob:
    """`job` with at most `seconds` to live; None changes nothing."""
    own = job.timeout_seconds
    if seconds is None or (own is not None and own <= seconds):
        return job
    return replace(job, timeout_seconds=seconds)


def until(job: AnyJob, deadline: float | None) -> AnyJob:
    """`job`, which begins now, so that it ends at `deadline`, in `time.monotonic()` seconds; None changes nothing."""
    return job if deadline is None else replace(job, timeout_seconds=max(1e-6, deadline - time.monotonic()))


class GenerationRunner:
    """Runs the jobs of all protocols, and counts those that are running.

    A job is refused unless `health` is ready. `request_timeout_seconds` bounds every job; a shorter `timeout_seconds` of its
    own wins. The generator comes with `attach` where it can be made only when the checkpoint is there. `rate_limits`: what of
    requests and tokens a minute each tenant has left.
    """

    def __init__(
        self,
        generator: TextGenerator | TextPooler | None,
        health: ModelHealth,
        *,
        request_timeout_seconds: float | None,
        observe: ObserverFactory,
        rate_limits: RateLimiter | None = None,
    ) -> None:
        self._generator = generator
        self.health = health
        self.request_timeout_seconds = request_timeout_seconds
        self._observe = observe
        self._num_running = 0
        self.last_end = 0.0  # of a job, monotonic
        self._idle = asyncio.Event()
        self._idle.set()
        self._waits: set[InterruptibleWait] = set()
        self._running: set[asyncio.Future[None]] = set()  # done when a job has ended
        self._is_stopped = False
        self.rate_limits = rate_limits or RateLimiter()

    @property
    def generator(self) -> TextGenerator | TextPooler:
        """The text layer; raises `EngineNotReadyError` before it is there."""
        if self._generator is None:
            raise EngineNotReadyError("the model is loading")
        return self._generator

    @property
    def has_generator(self) -> bool:
        """Whether the text layer is there."""
        return self._generator is not None

    def detach(self) -> None:
        """There is no generator any more."""
        self._generator = None

    def attach(self, generator: TextGenerator | TextPooler) -> None:
        """Use `generator` from now on."""
        self._generator = generator

    @property
    def num_running(self) -> int:
        """Jobs between their first and last step here."""
        return self._num_running

    async def wait_until_idle(self) -> None:
        """Return once no job is running."""
        await self._idle.wait()

    async def wait_for_those_running(self) -> None:
        """Return once all jobs have ended that are running now."""
        ends = list(self._running)
        if ends:
            await asyncio.wait(ends)

    def stop(self) -> None:
        """Abort every running job with `EngineNotReadyError`: the server's grace period is over."""
        self._is_stopped = True
        for wait in list(self._waits):
            wait.interrupt(_stopped)

    async def stream(
        self, job: Job, request_id: str, *, is_request: bool = True, places: QueuePlaces | None = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        """The chunks of a job as they come. Close the iterator (or cancel its reader) to abort the job in the engine.

        `is_request`: it counts as a request of its caller. `places`: it is one of several that have them together. Raises what
        `TextGenerator.generate` raises, and before that what `ModelHealth.check_ready` and `RateLimiter.admit` do.
        """
        self.health.check_ready()
        caller = caller_var.get()
        if is_request:
            self.rate_limits.admit(caller.tenant, caller.limits)
        counts_tokens = caller.limits.tokens_per_minute is not None
        arrival = time.monotonic()
        own = _of_caller(job, request_id)
        observer = self._observe(own, arrival)
        self._num_running += 1
        self._idle.clear()
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running.add(end)
        wait = InterruptibleWait()
        timer = self._bound(wait, self.deadline(job, arrival))
        error: BaseException | None = None
        try:
            chunks = self.generator.generate(own, places)
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
            self._running.discard(end)
            if not end.done():
                end.set_result(None)
            self.last_end = time.monotonic()
            if self._num_running == 0:
                self._idle.set()
            observer.on_end(error)
            del error  # it holds this frame through its traceback, and would be held by it

    async def collect(
        self, job: Job, request_id: str, *, is_request: bool = True, places: QueuePlaces | None = None
    ) -> list[CompletionOutput]:
        """The `params.n` finished sequences of a job, in order of their index."""
        results = [CompletionOutput(index=index) for index in range(job.params.n)]
        async with aclosing(self.stream(job, request_id, is_request=is_request, places=places)) as chunks:
            async for chunk in chunks:
                results[chunk.index].add(chunk)
        return results

    async def pool_all(self, jobs: Sequence[PoolingRequest], request_id: str) -> list[CompletionOutput]:
        """What came of all jobs, which may be more than the queue takes: as many at a time as the engine has slots."""
        self.health.check_ready()
        ready = self.generator.client.ready
        at_once = max(1, ready.max_num_seqs) if ready is not None else 1
        deadline = self.deadline(jobs[0])
        outputs: list[CompletionOutput] = []
        for start in range(0, len(jobs), at_once):
            part = [until(job, deadline) for job in jobs[start : start + at_once]]
            found = await self.collect_all(part, f"{request_id}-{start}" if start else request_id, is_request=not start)
            outputs += [output for (output,) in found]
        return outputs

    async def collect_all(
        self, jobs: Sequence[Job], request_id: str, *, is_request: bool = True
    ) -> list[list[CompletionOutput]]:
        """The results of all jobs, side by side; the first error aborts the others and is raised."""
        if len(jobs) == 1:
            return [await self.collect(jobs[0], request_id, is_request=is_request)]
        tasks: list[asyncio.Task[list[CompletionOutput]]] = []
        try:
            with self._reserve(jobs) as places:
                async with cancelling(tasks):
                    for index, job in enumerate(jobs):
                        is_first = is_request and index == 0
                        part = self.collect(job, f"{request_id}-{index}", is_request=is_first, places=places)
                        tasks.append(asyncio.create_task(part))
                        await asyncio.sleep(0)  # each begins in a turn of the loop of its own: they may have much to do
                    return await asyncio.gather(*tasks)
        finally:
            del tasks  # their errors hold this frame through their tracebacks

    def stream_all(self, jobs: Sequence[Job], request_id: str) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        """`(job index, chunk)` of all jobs as they come; the first error aborts the others and is raised.

        Each job is read one chunk ahead at most, so that a slow reader holds back what is buffered here.
        """
        return self._stream_only(jobs[0], request_id) if len(jobs) == 1 else self._stream_several(jobs, request_id)

    async def _stream_several(
        self, jobs: Sequence[Job], request_id: str
    ) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        with self._reserve(jobs) as places:
            parts = [
                self.stream(job, f"{request_id}-{index}", is_request=index == 0, places=places)
                for index, job in enumerate(jobs)
            ]
            async with aclosing(merge_streams(parts)) as chunks:
                async for item in chunks:
                    yield item

    def _reserve(self, jobs: Sequence[Job]) -> QueuePlaces:
        """Places in the engine's queue for all sequences of a request, or the error that refuses it."""
        self.health.check_ready()
        return self.generator.client.reserve(caller_var.get().tenant, sum(job.params.n for job in jobs))

    async def _stream_only(self, job: Job, request_id: str) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        async with aclosing(self.stream(job, request_id)) as chunks:
            async for chunk in chunks:
                yield 0, chunk

    def deadline(self, job: Job, arrival: float | None = None) -> float | None:
        """When a job ends that arrived at `arrival`, or arrives now, in `time.monotonic()` seconds; None: never."""
        arrival = time.monotonic() if arrival is None else arrival
        limits = [seconds for seconds in (self.request_timeout_seconds, job.timeout_seconds) if seconds]
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


class AdapterRunner(GenerationRunner):
    """The runner of a model as an adapter's: the same but for what computes its jobs, all of which pass `stream`."""

    def __init__(self, runner: GenerationRunner, adapter: LoraAdapter) -> None:
        self._runner = runner
        self._adapter = adapter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    @override
    def stream(
        self, job: Job, request_id: str, *, is_request: bool = True, places: QueuePlaces | None = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        return self._runner.stream(
            replace(job, adapter=self._adapter), request_id, is_request=is_request, places=places
        )


def _stopped() -> EngineNotReadyError:
    return EngineNotReadyError("the server shut down before the request was finished; send it to another replica")


def _deadline_exceeded() -> DeadlineExceededError:
    return DeadlineExceededError("the request's deadline passed before it was finished")
