"""Counts requests where all protocols meet: around the stream of chunks that answers one job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from pagoda.errors import DeadlineExceededError, EngineNotReadyError, ErrorKind, PagodaError
from pagoda.pooling.params import PoolingParams
from pagoda.request import sequence_ids
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.serving.metrics.prometheus import Metrics
from pagoda.serving.metrics.request_timer import NO_SLOS, RequestTimer, Slos
from pagoda.text.output import GenerationChunk

ENDS = frozenset({ErrorKind.ENGINE_DEAD, ErrorKind.DEADLINE_EXCEEDED, ErrorKind.INTERNAL})
"""Kinds of error that end a job which was accepted; with any other it is turned away."""


class RequestMeter:
    """Counts each sequence of one job exactly once, however the job ends: a `RequestObserver` of `GenerationRunner`.

    `arrival_time`: monotonic seconds, as `clock` gives them. `request_id`: the job's.
    A job that was refused was never accepted: it is no request here, only an error answer, which the protocol counts. A client
    that leaves before the first chunk leaves an accepted request behind.
    """

    def __init__(
        self,
        metrics: Metrics,
        params: SamplingParams | PoolingParams,
        arrival_time: float,
        clock: Callable[[], float] = time.monotonic,
        slos: Slos = NO_SLOS,
        request_id: str = "",
    ) -> None:
        self._clock = clock
        self._timers = [
            RequestTimer(metrics, arrival_time, params.max_tokens, slos, name)
            for name in sequence_ids(request_id, params.n)
        ]
        self._metrics = metrics
        self._is_accepted = False

    def on_chunk(self, chunk: GenerationChunk) -> None:
        """A piece of one sequence came."""
        self._is_accepted = True
        timer, now = self._timers[chunk.index], self._clock()
        if chunk.num_prompt_tokens is not None:
            timer.start(chunk.num_prompt_tokens, chunk.scheduled_time, chunk.num_cached_tokens or 0)
        timer.tokens(len(chunk.token_ids), now)
        if chunk.finish_reason is not None:
            is_abort = chunk.finish_reason is FinishReason.ABORT
            timer.end(chunk.finish_reason, now, abort_cause="server" if is_abort else None)
        self._metrics.observe_steps()

    def on_end(self, error: BaseException | None) -> None:
        """The job is over; sequences that are not finished end as `error` says."""
        if not self._is_accepted and isinstance(error, PagodaError) and error.kind not in ENDS:
            return
        reason, cause = _ending(error)
        now = self._clock()
        for timer in self._timers:
            timer.end(reason, now, abort_cause=cause)


def _ending(error: BaseException | None) -> tuple[FinishReason, str | None]:
    """Finish reason, and cause of the abort, of sequences that `error` cut off."""
    if isinstance(error, DeadlineExceededError):
        return FinishReason.ABORT, "deadline"
    if isinstance(error, EngineNotReadyError):
        return FinishReason.ABORT, "server"
    if error is None or isinstance(error, asyncio.CancelledError | GeneratorExit):
        return FinishReason.ABORT, "client"
    return FinishReason.ERROR, None
