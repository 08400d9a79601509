"""The limits of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """`long_prefill_token_threshold`: the most tokens of one prompt in a step; 0: the whole budget; None: see `StepComposer`.
    `target_itl_ms`: the most time between two tokens of a request in 99 of 100 steps, while prompts are computed.

    A request preempted `max_preemptions` times is protected: others are chosen as victims while there are any.
    `num_scheduler_steps` above 1 lets a batch that only decodes run so many steps on one plan. `num_speculative_tokens`: the
    most drafts of a row, 0 without speculative decoding. `max_request_seconds`, from
    arrival, ends a request with what it has. `repetition_detection` (off, warn, stop) looks for an output whose last
    `repetition_min_tokens` tokens repeat a period of at most `repetition_max_period`. With `pipeline_parallel_size` above 1 so
    many plans are in flight at once, and the first stage has a sampled token only when the result of its step is there.
    `max_loras`: adapters whose requests run together, of `max_cpu_loras` whose weights are in memory.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_waiting: int
    long_prefill_token_threshold: int | None = 0
    target_itl_ms: float | None = None
    max_preemptions: int = 4
    policy: str = "fcfs"
    num_scheduler_steps: int = 1
    num_speculative_tokens: int = 0
    pipeline_parallel_size: int = 1
    max_request_seconds: float | None = None
    repetition_detection: str = "off"
    repetition_max_period: int = 64
    repetition_min_tokens: int = 256
    max_loras: int = 0
    max_cpu_loras: int = 0
