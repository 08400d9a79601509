"""Counts requests where all protocols meet: around the stream of chunks that answers one job.

The seam is `serving.generation.RequestObserver`; types here are by shape, since nothing below `serving` may import it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from pagoda.errors import DeadlineExceededError, EngineNotReadyError, ErrorKind, PagodaError
from pagoda.serving.metrics.prometheus import Metrics
from pagoda.serving.metrics.request_timer import RequestTimer

REFUSALS = frozenset(
    {
        ErrorKind.INVALID_REQUEST,
        ErrorKind.NOT_FOUND,
        ErrorKind.TOO_LARGE,
        ErrorKind.NOT_SUPPORTED,
        ErrorKind.QUEUE_FULL,
        ErrorKind.NOT_READY,
    }
)
"""Kinds of error with which a job is turned away; any other ends a job that had been accepted."""


class MeteredSampling(Protocol):
    """What is read of `SamplingParams`."""

    @property
    def n(self) -> int:
        """Sequences to generate."""

    @property
    def max_tokens(self) -> int | None:
        """The length limit the client gave."""


class MeteredJob(Protocol):
    """What is read of `pagoda.request.GenerationRequest`."""

    @property
    def params(self) -> MeteredSampling:
        """How the job's sequences are generated."""


class MeteredChunk(Protocol):
    """What is read of `text.output.GenerationChunk`."""

    @property
    def index(self) -> int:
        """The sequence the chunk belongs to, 0 to n-1."""

    @property
    def token_ids(self) -> list[int]:
        """New tokens."""

    @property
    def finish_reason(self) -> str | None:
        """Set on a sequence's last chunk."""

    @property
    def num_prompt_tokens(self) -> int | None:
        """Set on a sequence's first chunk."""

    @property
    def scheduled_time(self) -> float | None:
        """When the sequence left the waiting queue, monotonic seconds; on its first chunk."""


def request_meters(
    metrics: Metrics, clock: Callable[[], float] = time.monotonic
) -> Callable[[MeteredJob, float], RequestMeter]:
    """Makes the meter of each job: to be given to `GenerationRunner` as `observe`."""
    return lambda job, arrival_time: RequestMeter(metrics, job, arrival_time, clock)


class RequestMeter:
    """Counts each sequence of one job exactly once, however the job ends.

    A job that was refused was never accepted: it is no request here, only an error answer, which the protocol counts. A
    client that leaves before the first chunk leaves an accepted request behind.
    """

    def __init__(self, metrics: Metrics, job: MeteredJob, arrival_time: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._timers = [RequestTimer(metrics, arrival_time, job.params.max_tokens) for _ in range(job.params.n)]
        self._metrics = metrics
        self._is_accepted = False

    def on_chunk(self, chunk: MeteredChunk) -> None:
        """A piece of one sequence came."""
        self._is_accepted = True
        timer, now = self._timers[chunk.index], self._clock()
        if chunk.num_prompt_tokens is not None:
            timer.start(chunk.num_prompt_tokens, chunk.scheduled_time)
        timer.tokens(len(chunk.token_ids), now)
        if chunk.finish_reason is not None:
            reason = str(chunk.finish_reason)
            timer.end(reason, now, abort_cause="server" if reason == "abort" else None)
        self._metrics.observe_steps()

    def on_end(self, error: BaseException | None) -> None:
        """The job is over; sequences that are not finished end as `error` says."""
        if not self._is_accepted and isinstance(error, PagodaError) and error.kind in REFUSALS:
            return
        reason, cause = _ending(error)
        now = self._clock()
        for timer in self._timers:
            timer.end(reason, now, abort_cause=cause)


def _ending(error: BaseException | None) -> tuple[str, str | None]:
    """Finish reason, and cause of the abort, of sequences that `error` cut off."""
    if isinstance(error, DeadlineExceededError):
        return "abort", "deadline"
    if isinstance(error, EngineNotReadyError):
        return "abort", "server"
    if error is None or isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "abort", "client"
    return "error", None
