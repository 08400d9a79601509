"""What is measured of one generated sequence, from its arrival to its end."""

from __future__ import annotations

import logging
from typing import NamedTuple

from pagoda.sampling.output import FinishReason
from pagoda.serving.metrics.ended_request import EndedRequest
from pagoda.serving.metrics.prometheus import Metrics

logger = logging.getLogger("pagoda.requests")


class Slos(NamedTuple):
    """What a request came with, in seconds: time to the first token, and for each further one. None: it wants nothing."""

    ttft: float | None = None
    tpot: float | None = None


NO_SLOS = Slos()


class RequestTimer:
    """Feeds one sequence's times and tokens into `metrics`; one for each of a request's `n` choices.

    All times are monotonic seconds. `max_tokens` is what the client gave, None if nothing; `slos` are what it wants;
    `request_id` is what the sequence is called in the engine. Call
    `start` when the engine is known to have the sequence, `tokens` for each batch of new ones, `end` at the end; only the
    first `end` counts, so that every way out of a request may call it.
    """

    __slots__ = (
        "_arrival_time",
        "_first_token_time",
        "_last_token_time",
        "_max_tokens",
        "_metrics",
        "_num_cached_tokens",
        "_num_generated_tokens",
        "_num_prompt_tokens",
        "_request_id",
        "_scheduled_time",
        "_slos",
        "ended",
    )

    def __init__(
        self,
        metrics: Metrics,
        arrival_time: float,
        max_tokens: int | None,
        slos: Slos = NO_SLOS,
        request_id: str = "",
    ) -> None:
        self._metrics = metrics
        self._request_id = request_id
        self._arrival_time = arrival_time
        self._max_tokens = max_tokens
        self._slos = slos
        self._num_prompt_tokens: int | None = None
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0
        self._scheduled_time: float | None = None
        self._first_token_time: float | None = None
        self._last_token_time = arrival_time
        self.ended = False

    def start(self, num_prompt_tokens: int, scheduled_time: float | None, num_cached_tokens: int = 0) -> None:
        """The prompt was computed, but for what was cached; `scheduled_time` is when the sequence left the waiting queue."""
        self._num_prompt_tokens, self._num_cached_tokens = num_prompt_tokens, num_cached_tokens
        self._scheduled_time = scheduled_time
        self._metrics.prompt_tokens.inc(num_prompt_tokens)

    def tokens(self, count: int, now: float) -> None:
        """`count` tokens came at once; the time since the last ones is shared out evenly among them."""
        if count == 0:
            return
        self._num_generated_tokens += count
        if self._first_token_time is None:
            self._first_token_time = self._last_token_time = now
            self._metrics.generated_tokens.add_first(count)
            self._metrics.time_to_first_token.observe(now - self._arrival_time)
            self._metrics.count_slo("ttft", now - self._arrival_time, self._slos.ttft)
            return
        self._metrics.generated_tokens.add(count, (now - self._last_token_time) / count)
        self._last_token_time = now

    def end(self, reason: FinishReason, now: float, *, abort_cause: str | None = None) -> None:
        """The sequence ended for `reason`; `abort_cause`, with ABORT, is one of `ABORT_CAUSES`."""
        if self.ended:
            return
        self.ended = True
        metrics = self._metrics
        metrics.request_success[reason].inc()
        if abort_cause is not None:
            metrics.request_aborts[abort_cause].inc()
        metrics.e2e_request_latency.observe(now - self._arrival_time)
        metrics.request_generation_tokens.observe(self._num_generated_tokens)
        if self._max_tokens is not None:
            metrics.request_params_max_tokens.observe(self._max_tokens)
        if self._num_prompt_tokens is not None:
            metrics.request_prompt_tokens.observe(self._num_prompt_tokens)
            logger.info(
                "%d prompt tokens, %d cached (%.1f %%), %d generated: %s",
                self._num_prompt_tokens,
                self._num_cached_tokens,
                100 * self._num_cached_tokens / self._num_prompt_tokens,
                self._num_generated_tokens,
                reason.value,
            )
        if self._scheduled_time is not None:
            metrics.request_queue_time.observe(self._scheduled_time - self._arrival_time)
            metrics.request_inference_time.observe(now - self._scheduled_time)
        if self._first_token_time is not None:
            seconds = self._last_token_time - self._first_token_time
            metrics.request_decode_time.observe(seconds)
            if self._num_generated_tokens > 1:
                metrics.count_slo("tpot", seconds / (self._num_generated_tokens - 1), self._slos.tpot)
            if self._scheduled_time is not None:
                metrics.request_prefill_time.observe(self._first_token_time - self._scheduled_time)
        if metrics.end_listeners:
            ended = self._ended(reason, now, abort_cause)
            for listen in metrics.end_listeners:
                listen(ended)

    def _ended(self, reason: FinishReason, now: float, cause: str | None) -> EndedRequest:
        first, scheduled, count = self._first_token_time, self._scheduled_time, self._num_generated_tokens
        return EndedRequest(
            request=self._request_id,
            ttft=None if first is None else first - self._arrival_time,
            tpot=None if first is None or count < 2 else (self._last_token_time - first) / (count - 1),
            e2el=now - self._arrival_time,
            queue=None if scheduled is None else scheduled - self._arrival_time,
            prompt_tokens=self._num_prompt_tokens,
            cached_tokens=self._num_cached_tokens,
            output_tokens=count,
            reason=reason.value,
            cause=cause,
        )
