"""Spans of jobs and their phases, out of the chunks that a `RequestObserver` sees, with the engine's steps where asked for.

Attributes are vLLM's (`gen_ai.request.id`, `gen_ai.latency.time_to_first_token`), so that what was made to look at its traces
works, and those of the semantic conventions for generative AI where these have another name. No text of a prompt or an answer
is in a span.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from opentelemetry import context as contexts
from opentelemetry import trace

from pagoda.engine.messages import EngineTrace
from pagoda.errors import PagodaError
from pagoda.pooling.params import PoolingParams
from pagoda.request import GenerationRequest, sequence_ids
from pagoda.sampling.params import SamplingParams
from pagoda.serving.generation import Job, RequestObserver
from pagoda.text.output import GenerationChunk

_LATE_SECONDS = 0.5
"""Steps are reported ten times a second: a detailed span waits so long for the last ones."""


class Clock:
    """Nanoseconds since the epoch of monotonic seconds, as of now."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def nanoseconds(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._offset


class _Sequence:
    """When one sequence of a job did what, in monotonic seconds."""

    def __init__(self) -> None:
        self.scheduled: float | None = None
        self.first: float | None = None
        self.last: float | None = None
        self.num_prompt: int | None = None
        self.num_cached = 0
        self.num_tokens = 0
        self.num_drafts = 0
        self.num_accepted = 0
        self.reason = "abort"

    def add(self, chunk: GenerationChunk, now: float) -> None:
        if chunk.num_prompt_tokens is not None:
            self.num_prompt, self.num_cached = chunk.num_prompt_tokens, chunk.num_cached_tokens or 0
            self.scheduled = chunk.scheduled_time
        if chunk.token_ids or chunk.pooled is not None:
            self.num_tokens += len(chunk.token_ids)
            self.last = now
            if self.first is None:
                self.first = now
        if chunk.finish_reason is not None:
            self.reason = chunk.finish_reason.value
            self.num_drafts, self.num_accepted = chunk.num_draft_tokens, chunk.num_accepted_tokens


class RequestSpan:
    """A `RequestObserver` that records its job, and passes all on to another."""

    def __init__(
        self,
        tracer: trace.Tracer,
        span: trace.Span,
        job: Job,
        arrival_time: float,
        inner: RequestObserver,
        clock: Clock,
        steps: StepEvents | None,
    ) -> None:
        self._tracer = tracer
        self._span = span
        self._arrival = arrival_time
        self._inner = inner
        self._clock = clock
        self._sequences = [_Sequence() for _ in range(job.params.n)]
        self._execute_seconds: float | None = None
        self._end_time = 0
        self._steps = steps
        self.request_ids = sequence_ids(job.request_id, job.params.n)
        if steps is not None:
            steps.add(self)

    def on_chunk(self, chunk: GenerationChunk) -> None:
        """A piece of one sequence came."""
        self._inner.on_chunk(chunk)
        self._sequences[chunk.index].add(chunk, time.monotonic())

    def on_end(self, error: BaseException | None) -> None:
        """The job is over."""
        self._inner.on_end(error)
        now = time.monotonic()
        self._set_attributes(now, error)
        self._add_phases(now)
        self._end_time = self._clock.nanoseconds(now)
        if self._steps is None:
            self.end()
        else:
            self._steps.end_later(self)

    def end(self) -> None:
        """Nothing is added any more."""
        self._span.end(self._end_time)

    def step(self, submitted: float, seconds: float, attributes: dict[str, Any]) -> None:
        """A step of the engine had a part of this job."""
        self._execute_seconds = (self._execute_seconds or 0.0) + seconds
        self._span.set_attribute("gen_ai.latency.time_in_model_execute", self._execute_seconds)
        self._span.add_event("step", attributes, self._clock.nanoseconds(submitted))

    def _set_attributes(self, now: float, error: BaseException | None) -> None:
        sequences = self._sequences
        first = min((one.first for one in sequences if one.first is not None), default=None)
        last = max((one.last for one in sequences if one.last is not None), default=None)
        scheduled = min((one.scheduled for one in sequences if one.scheduled is not None), default=None)
        num_tokens = sum(one.num_tokens for one in sequences)
        known: dict[str, Any] = {
            "gen_ai.latency.e2e": now - self._arrival,
            "gen_ai.usage.completion_tokens": num_tokens,
            "gen_ai.usage.output_tokens": num_tokens,
            "gen_ai.usage.num_sequences": len(sequences),
            "gen_ai.response.finish_reasons": [one.reason for one in sequences],
        }
        if sequences[0].num_prompt is not None:
            known["gen_ai.usage.prompt_tokens"] = known["gen_ai.usage.input_tokens"] = sequences[0].num_prompt
            known["gen_ai.usage.cache_read.input_tokens"] = sequences[0].num_cached
        if drafts := sum(one.num_drafts for one in sequences):
            known["pagoda.speculation.draft_tokens"] = drafts
            known["pagoda.speculation.accepted_tokens"] = sum(one.num_accepted for one in sequences)
        if scheduled is not None:
            known["gen_ai.latency.time_in_queue"] = scheduled - self._arrival
        if first is not None and last is not None:
            known["gen_ai.latency.time_to_first_token"] = first - self._arrival
            known["gen_ai.response.time_to_first_chunk"] = first - self._arrival
            known["gen_ai.latency.time_in_model_decode"] = last - first
            if scheduled is not None:
                known["gen_ai.latency.time_in_model_prefill"] = first - scheduled
                known["gen_ai.latency.time_in_model_inference"] = last - scheduled
        self._span.set_attributes(known)
        if isinstance(error, Exception) and not isinstance(error, asyncio.CancelledError):
            kind = error.kind.value if isinstance(error, PagodaError) else type(error).__name__
            self._span.set_attribute("error.type", kind)
            self._span.set_status(trace.StatusCode.ERROR)

    def _add_phases(self, now: float) -> None:
        for index, one in enumerate(self._sequences):
            number = {"pagoda.sequence": index} if len(self._sequences) > 1 else {}
            self._phase("queue", self._arrival, now if one.scheduled is None else one.scheduled, number)
            if one.scheduled is not None:
                tokens = {"pagoda.tokens": (one.num_prompt or 0) - one.num_cached, **number}
                self._phase("prefill", one.scheduled, now if one.first is None else one.first, tokens)
            if one.first is not None and one.last is not None and one.num_tokens > 1:
                self._phase("decode", one.first, one.last, {"pagoda.tokens": one.num_tokens, **number})

    def _phase(self, name: str, start: float, end: float, attributes: dict[str, Any]) -> None:
        parent = trace.set_span_in_context(self._span, contexts.Context())
        begin = self._clock.nanoseconds(start)
        span = self._tracer.start_span(name, parent, attributes=attributes, start_time=begin)
        span.end(self._clock.nanoseconds(end))


class StepEvents:
    """The engine's steps of jobs that are recorded, by the ids that their sequences have there."""

    def __init__(self) -> None:
        self._spans: dict[str, RequestSpan] = {}
        self._ending: dict[RequestSpan, asyncio.TimerHandle] = {}

    def add(self, span: RequestSpan) -> None:
        """Its steps are wanted from now on."""
        self._spans |= dict.fromkeys(span.request_ids, span)

    def end_later(self, span: RequestSpan) -> None:
        """It ends when its last steps are known."""
        self._ending[span] = asyncio.get_running_loop().call_later(_LATE_SECONDS, self._end, span)

    def end_all(self) -> None:
        """End those that wait."""
        for span, timer in list(self._ending.items()):
            timer.cancel()
            self._end(span)

    def listen(self, replica: int, trace: EngineTrace) -> None:
        """Steps of an engine; its ids are a sequence's, `#` and a number."""
        for step in trace.steps:
            tokens = sum(row.num_tokens for row in step.rows)
            for row in step.rows:
                span = self._spans.get(row.request_id.rpartition("#")[0])
                if span is not None:
                    attributes = {
                        "pagoda.step": step.step,
                        "pagoda.step.seconds": step.seconds,
                        "pagoda.step.rows": len(step.rows),
                        "pagoda.step.tokens": tokens,
                        "pagoda.computed_tokens": row.num_computed,
                        "pagoda.tokens": row.num_tokens,
                        "pagoda.draft_tokens": row.num_drafts,
                        "pagoda.new_tokens": row.num_new,
                        "pagoda.replica": replica,
                    }
                    span.step(step.submitted, step.seconds, attributes)

    def _end(self, span: RequestSpan) -> None:
        del self._ending[span]
        for request_id in span.request_ids:
            if self._spans.get(request_id) is span:
                del self._spans[request_id]
        span.end()


def request_attributes(model_name: str, job: Job) -> dict[str, Any]:
    """What a job asks for."""
    params = job.params
    known: dict[str, Any] = {
        "gen_ai.operation.name": _operation(job),
        "gen_ai.provider.name": "pagoda",
        "gen_ai.request.model": model_name,
        "gen_ai.response.model": model_name if job.adapter is None else job.adapter.name,
        "gen_ai.request.id": job.request_id,
        "gen_ai.response.id": job.request_id,
        "gen_ai.request.n": params.n,
        "gen_ai.request.stream": job.stream,
    }
    if isinstance(params, PoolingParams):
        return known
    known |= _sampling_attributes(params)
    return known


def _operation(job: Job) -> str:
    if isinstance(job, GenerationRequest):
        return "chat" if job.answer is not None else "text_completion"
    return "embeddings"


def _sampling_attributes(params: SamplingParams) -> dict[str, Any]:
    given: Iterable[tuple[str, Any]] = (
        ("max_tokens", params.max_tokens),
        ("temperature", float(params.temperature)),
        ("top_p", float(params.top_p)),
        ("top_k", float(params.top_k) if params.top_k > 0 else None),
        ("frequency_penalty", params.frequency_penalty or None),
        ("presence_penalty", params.presence_penalty or None),
        ("seed", params.seed),
        ("choice.count", params.n if params.n > 1 else None),
    )
    return {f"gen_ai.request.{name}": value for name, value in given if value is not None}
