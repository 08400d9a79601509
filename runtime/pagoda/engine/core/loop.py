"""The engine core: the loop that plans, runs and applies steps.

    drain inputs → plan = scheduler.schedule() → handle = executor.submit(plan) → scheduler.apply(plan, handle.result())

The caller drives it, one `step` at a time: by `LLM` in the caller's process, by `engine.core.process` in one of its own.
Where the executor can hold several steps (`max_concurrent_batches`), the next plan is made while the last one runs.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from pagoda.adapters import LoraAdapter
from pagoda.engine.core.step_recorder import StepRecorder, TracingRecorder
from pagoda.engine.messages import EngineOutput, EngineOutputs, EngineReady, EngineStats, EngineTrace
from pagoda.errors import (
    ConfigError,
    EngineDeadError,
    ErrorKind,
    InvalidRequestError,
    NotSupportedError,
    PagodaError,
)
from pagoda.execution.executor import AdapterOutcome, Executor, RankLoadListener, StepHandle, is_out_of_memory
from pagoda.parallel.rank_health import RankHealth
from pagoda.pooling.params import PoolingParams
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.cache_events import CacheEventSink
from pagoda.scheduling.plan import ExpertLoad, StepPlan
from pagoda.scheduling.request import Request
from pagoda.scheduling.scheduler import RequestUpdate, Scheduler
from pagoda.scheduling.step_timeout import tokens_to_wait_for
from pagoda.structured.outputs import StructuredOutputs

logger = logging.getLogger(__name__)

_COMPILE_WAIT_SECONDS = 0.05
_ADAPTER_WAIT_SECONDS = 0.02

SubmitListener = Callable[[int, int], None]


class _InFlight(NamedTuple):
    """A step that was submitted, at `submitted` monotonic seconds; `num_tokens`: see `tokens_to_wait_for`."""

    plan: StepPlan
    handle: StepHandle
    num_tokens: int
    submitted: float


class EngineCore:
    """A scheduler and an executor; independent of text and protocols. Not thread-safe: one thread drives it."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        ready: EngineReady,
        kv_events: CacheEventSink | None = None,
        structured: StructuredOutputs | None = None,
    ) -> None:
        """`ready` holds the limits that were found at start-up (see `engine.core.startup.start_core`)."""
        self._kv_events = kv_events or CacheEventSink()
        self.ready = ready
        self._structured = structured
        # Final outputs of requests that did not come as far as the scheduler.
        self._refused: list[EngineOutput] = []
        self._adapter_outcomes: list[AdapterOutcome] = []
        self._scheduler = scheduler
        self._sized = scheduler.limits
        self._executor = executor
        self._in_flight: deque[_InFlight] = deque()
        self._num_steps = 0
        self._num_scheduled_tokens = 0
        self._step_seconds = 0.0
        self._expert_load: ExpertLoad | None = None
        self._was_idle = True
        self._recorder = StepRecorder()
        # Called with the number of steps done and of tokens in flight, those of the step that is about to be submitted
        # included: on a CPU a step is over when it is submitted.
        self.on_submit: SubmitListener | None = None

    def most_blocks(self, num_tokens: int) -> int:
        """KV blocks, of all groups, that a request of so many tokens takes at most."""
        return self._scheduler.kv.most_blocks(num_tokens)

    @property
    def has_work(self) -> bool:
        """Whether a `step` would do anything."""
        return (
            self._scheduler.has_work
            or bool(self._in_flight)
            or self._has_unscheduled
            or self._scheduler.adapters.has_changes
        )

    @property
    def num_tokens_in_flight(self) -> int:
        """Tokens of all steps in flight, as the stall bound counts them."""
        return sum(step.num_tokens for step in self._in_flight)

    def add_request(self, request: EngineRequest) -> None:
        """Accept a request. Raises `InvalidRequestError` or `QueueFullError`, and then has no effect.

        This and `Scheduler.add` refuse only what would harm other requests. Client errors were found before, by
        `text.validation`; nothing after this checks a prompt again.
        """
        prompt, vocab_size = request.prompt_token_ids, self.ready.vocab_size
        if prompt and not 0 <= min(prompt) <= max(prompt) < vocab_size:
            # The embedding would be read out of bounds, which on a GPU is the end of the process.
            raise InvalidRequestError(f"the prompt has token ids outside of 0 to {vocab_size - 1}", "prompt")
        if request.adapter is not None and not self._scheduler.limits.max_loras:
            raise NotSupportedError("this engine is served without LoRA adapters (enable_lora)")
        params = request.params
        if isinstance(params, SamplingParams) == bool(self.ready.pooling_tasks):
            does = ", ".join(self.ready.pooling_tasks) or "generate"
            raise NotSupportedError(f"this model is served for {does}")
        if isinstance(params, PoolingParams):
            params.checked(self.ready.pooling_tasks, self.ready.output_size)
        if isinstance(params, PoolingParams) or params.structured_outputs is None:
            self._scheduler.add(Request(request))
        elif self._structured is None:
            raise NotSupportedError("this engine has no structured outputs")
        elif (matcher := self._structured.add(request)) is not None:
            self._scheduler.add(Request(request, matcher))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Abort requests; unknown ids and those of finished requests are ignored."""
        request_ids = list(request_ids)
        if self._structured is not None:
            for request_id in self._structured.discard(request_ids):
                self._refused.append(EngineOutput(request_id=request_id, finish_reason=FinishReason.ABORT))
        self._scheduler.abort(request_ids)

    def load_adapter(self, adapter: LoraAdapter) -> None:
        """Read an adapter before there are requests for it; `take_adapter_outcomes` says what came of it."""
        if not self._scheduler.limits.max_loras:
            self._adapter_outcomes.append(
                AdapterOutcome(adapter, "the engine is served without adapters (enable_lora)")
            )
        elif not self._scheduler.adapters.want(adapter):
            self._adapter_outcomes.append(AdapterOutcome(adapter))

    def unload_adapter(self, adapter: LoraAdapter) -> None:
        """Free the memory of an adapter, once it has no requests."""
        self._scheduler.adapters.retire(adapter)

    def take_adapter_outcomes(self) -> list[AdapterOutcome]:
        """What came of the adapters that were asked for, since the last call."""
        outcomes, self._adapter_outcomes = self._adapter_outcomes, []
        return outcomes

    def reset_prefix_cache(self) -> None:
        """Let no later request find what is cached now."""
        self._scheduler.reset_prefix_cache()

    def reconfigure(self, changes: Mapping[str, Any]) -> None:
        """Plan within other limits from the next step on: `changes` of `SchedulerLimits`, all of them or none.

        Raises `ConfigError` for what is more than memory was sized for at start.
        """
        sized, given = self._sized, dict(changes)
        for name in ("max_num_seqs", "max_num_batched_tokens", "num_speculative_tokens"):
            most = getattr(sized, name)
            if given.get(name, most) is None:
                given[name] = most
            if given.get(name, 0) > most:
                raise ConfigError(
                    f"{name}={given[name]}: must be at most {most}, what was sized at start, without a restart"
                )
        limits = replace(self._scheduler.limits, **given)
        if limits.max_num_batched_tokens < limits.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={limits.max_num_batched_tokens}: must be at least max_num_seqs={limits.max_num_seqs}"
            )
        self._scheduler.configure(limits)

    def sleep(self, level: int) -> None:
        """Give back weights and KV cache. Raises `InvalidRequestError` while requests are running."""
        if self.has_work:
            raise InvalidRequestError("requests are running: an engine sleeps when it is idle")
        self._scheduler.reset_prefix_cache()  # what it holds goes with the KV cache
        self._kv_events.flush()
        self._executor.release(level)
        self._scheduler.adapters.forget_weights()

    def wake_up(self, progress: RankLoadListener | None = None) -> None:
        """Take weights and KV cache again, as many blocks as before."""
        self._executor.load(progress)
        self._executor.initialize_kv_cache(self.ready.num_blocks, self.ready.max_model_len)

    def trace_steps(self, is_on: bool, *, kernels: bool = False) -> None:
        """Record steps from now on for `take_trace`, or no longer; `kernels`: also what runs within them."""
        self._recorder.close()
        recorder = self._executor.record_kernels() if is_on and kernels else None
        self._recorder = TracingRecorder(self._scheduler, recorder) if is_on else StepRecorder()

    def take_trace(self) -> EngineTrace | None:
        """What was recorded since the last time; None where nothing is, or too little time has passed."""
        return self._recorder.take(time.monotonic(), is_idle=not self.has_work)

    def step(self) -> EngineOutputs:
        """Run one turn of the loop and return the output of every request that has any.

        A step that raises ends the requests in it, with its error; the engine goes on. Raises `EngineDeadError` only when the
        executor is unusable.
        """
        started = time.monotonic()
        if self._has_unscheduled:
            self._schedule_compiled()
        self._plan_ahead()
        if self._scheduler.adapters.has_changes:
            self._change_adapters()
        updates = self._collect_oldest(started)
        updates += self._scheduler.take_ended()
        if not self.has_work and not self._was_idle:
            self._check_idle()
        self._was_idle = not self.has_work
        self._kv_events.flush()
        now = time.monotonic()
        self._step_seconds = now - started
        outputs = [_output(update) for update in updates]
        if self._refused:
            outputs += self._refused
            self._refused = []
        return EngineOutputs(outputs, self.stats(), now)

    @property
    def _has_unscheduled(self) -> bool:
        return bool(self._refused) or (self._structured is not None and self._structured.num_compiling > 0)

    def _schedule_compiled(self) -> None:
        """Hand the requests whose grammars are compiled to the scheduler; with nothing else to do, wait a moment for one."""
        assert self._structured is not None
        is_idle = not (self._scheduler.has_work or self._in_flight or self._refused)
        for request, outcome in self._structured.take_compiled(_COMPILE_WAIT_SECONDS if is_idle else 0.0):
            try:
                if isinstance(outcome, PagodaError):
                    raise outcome
                self._scheduler.add(Request(request, outcome))
            except PagodaError as error:
                self._refused.append(
                    EngineOutput(
                        request_id=request.request_id,
                        finish_reason=FinishReason.ERROR,
                        error_kind=error.kind,
                        error=str(error),
                    )
                )

    def _change_adapters(self) -> None:
        """Have the ranks read and drop adapters, and take what was read; with nothing else to do, wait a moment for that."""
        gate = self._scheduler.adapters
        for slot in gate.take_unloads():
            self._executor.unload_adapter(slot)
        for slot, adapter in gate.take_loads():
            self._executor.load_adapter(slot, adapter)
        timeout = 0.0 if self._in_flight else _ADAPTER_WAIT_SECONDS
        for outcome in self._executor.take_loaded_adapters(timeout) if gate.is_loading else ():
            self._adapter_outcomes.append(outcome)
            if outcome.error is None:
                gate.loaded(outcome.adapter)
            else:
                logger.warning("adapter %s: %s", outcome.adapter, outcome.error)
                gate.failed(outcome.adapter)
                self._scheduler.fail_requests_of(outcome.adapter, ErrorKind.INVALID_REQUEST, outcome.error)

    def _check_idle(self) -> None:
        """Mend a leak: it is an error, but no reason to end the engine, and without requests everything can be taken back."""
        leak = self._scheduler.find_leak()
        if leak:
            logger.error("leak in an idle engine: %s; request slots and KV cache are reset", leak)
            self._scheduler.reset()

    def _plan_ahead(self) -> None:
        while len(self._in_flight) < self._executor.max_concurrent_batches:
            plan = self._scheduler.schedule()
            if plan is None:
                return
            if self._structured is not None:
                self._structured.mask(plan, self._scheduler.requests_of(plan))
            self._num_scheduled_tokens += plan.total_tokens
            num_tokens = tokens_to_wait_for(plan)
            if self.on_submit is not None:
                self.on_submit(self._num_steps, self.num_tokens_in_flight + num_tokens)
            try:
                submitted = time.monotonic()
                self._in_flight.append(_InFlight(plan, self._executor.submit(plan), num_tokens, submitted))
            except Exception as error:  # any error ends the requests of this step, not the engine
                self._fail_step(plan, error)
                return

    def _collect_oldest(self, started: float) -> list[RequestUpdate]:
        if not self._in_flight:
            return []
        plan, handle, _, submitted = self._in_flight.popleft()
        try:
            result = handle.result()
        except Exception as error:  # as above: a step may fail in any way
            self._fail_step(plan, error)
            return []
        self._num_steps += 1
        self._expert_load = result.expert_load or self._expert_load
        updates = self._scheduler.apply(plan, result)
        now = time.monotonic()
        self._scheduler.observe(plan, result, now - started)
        self._recorder.record(self._num_steps, plan, updates, submitted, now)
        return updates

    def _fail_step(self, plan: StepPlan, error: Exception) -> None:
        """Out of memory: plan the step again, smaller. Any other error ends the requests of the step.

        Steps planned after it are dropped with it. Then the executor is checked: it may be unusable.
        """
        if is_out_of_memory(error) and self._scheduler.retry_in_flight():
            logger.warning(
                "out of memory in a step of %d tokens (%s): the token budget of a step is halved",
                plan.total_tokens,
                error,
            )
            self._in_flight.clear()
            return
        logger.exception("step %d with %d tokens failed", plan.step_id, plan.total_tokens, exc_info=error)
        self._in_flight.clear()
        self._scheduler.fail_in_flight(f"the model step failed: {type(error).__name__}: {error}")
        try:
            self._executor.check_health()
        except Exception as fault:  # any error: no further step can run
            raise EngineDeadError(f"the executor is unusable after a failed step: {fault}") from error

    def check_health(self) -> None:
        """Raise `EngineDeadError` when no further step can run; called while the engine is idle."""
        self._executor.check_health()

    def ranks(self) -> list[RankHealth]:
        """The processes of the ranks; empty when there are none but this one."""
        return self._executor.ranks()

    def stats(self) -> EngineStats:
        """The engine's figures as of now."""
        kv, speculation = self._scheduler.kv, self._scheduler.speculation
        return EngineStats(
            step=self._num_steps,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_blocks=kv.pool.num_usable,
            num_blocks_in_use=kv.pool.num_in_use,
            prefix_cache_queries=kv.num_prefix_queries,
            prefix_cache_hits=kv.num_prefix_hits,
            prefix_cache_misses=dict(kv.prefix_misses.num_tokens),
            num_preemptions=self._scheduler.num_preemptions,
            num_repetitions=self._scheduler.repetition.num_found,
            num_scheduled_tokens=self._num_scheduled_tokens,
            num_spec_drafts=speculation.num_drafts,
            num_spec_draft_tokens=speculation.num_draft_tokens,
            num_spec_accepted_tokens=speculation.num_accepted_tokens,
            num_spec_accepted_tokens_per_pos=list(speculation.num_accepted_per_position),
            step_seconds=self._step_seconds,
            degradation=self._scheduler.degradation,
            expert_load=self._expert_load,
            running_adapters=self._scheduler.adapters.running,
            waiting_adapters=self._scheduler.adapters.waiting,
        )

    def shutdown(self) -> None:
        self._kv_events.close()
        if self._structured is not None:
            self._structured.shutdown()
        self._executor.shutdown()


def _output(update: RequestUpdate) -> EngineOutput:
    request = update.request
    return EngineOutput(
        request_id=request.spec.request_id,
        new_token_ids=update.new_token_ids,
        logprobs=update.logprobs,
        prompt_logprobs=update.prompt_logprobs,
        pooled=update.pooled,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        error_kind=request.error_kind,
        error=request.error,
        is_complete=request.is_complete,
        num_cached_tokens=request.num_cached_tokens,
        scheduled_time=request.scheduled_time,
        num_draft_tokens=request.num_draft_tokens,
        num_accepted_tokens=request.num_accepted_tokens,
    )
