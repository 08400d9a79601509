"""The messages between the engine client and the engine core, except `EngineRequest`.

Dataclasses, so that the in-process engine needs nothing but the standard library; `engine.wire` encodes the same classes with
msgspec when core and client are two processes. All are frozen but `EngineOutput`: one is made for every token, and Python
takes more than twice as long to make it frozen. Times are `time.monotonic()` seconds, one clock per machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pagoda.adapters import LoraAdapter
from pagoda.errors import ErrorKind
from pagoda.execution.traced_kernel import TracedKernel
from pagoda.parallel.rank_health import RankHealth
from pagoda.pooling.output import PooledOutput
from pagoda.sampling.output import FinishReason, TokenLogprobs
from pagoda.scheduling.plan import ExpertLoad


@dataclass(slots=True, kw_only=True)
class EngineOutput:
    """The output of a step for one request.

    `new_token_ids` were appended (the stop token included, if one was hit). `logprobs` has one entry for each of them.
    `prompt_logprobs` comes once, with the output that completes the prompt: one entry a prompt token, the first None.
    `finish_reason` is set on the last output of the request and only there; `stop_reason` is then the stop token's id when
    one of `stop_token_ids` ended it, or the name of the setting that did (`max_request_seconds`). `error_kind` and `error`
    are set when the reason is ERROR. `is_complete`: the reason is STOP since nothing may follow in a constrained output; its
    last token is part of the text.
    `pooled`: of a request that pools, its one output.
    `scheduled_time` is when the request first left the waiting queue. `num_draft_tokens` of speculative decoding were verified
    for the request so far, `num_accepted_tokens` of them accepted.
    """

    request_id: str
    new_token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    pooled: PooledOutput | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error_kind: ErrorKind | None = None
    error: str | None = None
    is_complete: bool = False
    num_cached_tokens: int = 0
    scheduled_time: float | None = None
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges as of now, and counts since the core started; the receiver takes differences of the counts.

    `prefix_cache_misses`: tokens by the reason why they were not cached (`scheduling.prefix_misses`).

    `num_spec_drafts`: times that drafts of a sequence were verified, `num_spec_draft_tokens` in all, of which
    `num_spec_accepted_tokens` were accepted, by their place among the drafts `num_spec_accepted_tokens_per_pos`.
    `degradation`: a description of the reduced capacity; empty at full capacity. `expert_load`: the last that was measured.
    `running_adapters`, `waiting_adapters`: names of those with such requests.
    """

    step: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_in_use: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prefix_cache_misses: dict[str, int] = field(default_factory=dict)
    num_preemptions: int = 0
    num_repetitions: int = 0
    num_scheduled_tokens: int = 0
    num_spec_drafts: int = 0
    num_spec_draft_tokens: int = 0
    num_spec_accepted_tokens: int = 0
    num_spec_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    step_seconds: float = 0.0
    degradation: str = ""
    expert_load: ExpertLoad | None = None
    running_adapters: list[str] = field(default_factory=list)
    waiting_adapters: list[str] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float | None:
        """Tokens of a sequence a step in which it had drafts: the accepted ones and the one after them; None before the
        first."""
        return 1 + self.num_spec_accepted_tokens / self.num_spec_drafts if self.num_spec_drafts else None

    @property
    def kv_cache_usage(self) -> float:
        """Share of KV blocks that running requests hold, 0 to 1."""
        return self.num_blocks_in_use / self.num_blocks if self.num_blocks else 0.0


@dataclass(frozen=True, slots=True)
class EngineOutputs:
    """The outputs of one step, and the engine's figures after it."""

    outputs: list[EngineOutput]
    stats: EngineStats
    timestamp: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReady:
    """Sent once by a core that can take requests: the limits that admission needs.

    `device` is "cpu" or "cuda", `dtype` that of weights and activations. `num_speculative_tokens`: the most drafts of a
    sequence in a step; 0 without speculative decoding. `pooling_tasks`: what a model that pools does, empty for one that
    generates; its outputs have `output_size` numbers, those of a classifier the names `labels`. `kv_equation` is the sentence
    that says how many KV blocks there are, and why; `phase_seconds` holds the time each start-up phase took. `num_parameters`
    take part in a token; they are read as `weight_bytes`, and for each token before it `kv_bytes_per_token`; 0: not known.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int
    vocab_size: int
    device: str = "cpu"
    dtype: str = ""
    num_speculative_tokens: int = 0
    pooling_tasks: tuple[str, ...] = ()
    output_size: int = 0
    labels: tuple[str, ...] = ()
    kv_equation: str = ""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    num_parameters: int = 0
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0


@dataclass(frozen=True, slots=True)
class StartCore:
    """The first message to a core process: the configuration's fields (those that the core has no use for are left out).

    `environment`: variables that it gets beside those of its parent. `niceness`: of its work before it is ready, see nice(2).
    """

    config: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    niceness: int = 0


@dataclass(frozen=True, slots=True)
class EngineStartupPhase:
    """The core entered start-up phase `name`; `detail` is for people."""

    name: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class EngineRanks:
    """The processes of the ranks, about once a second; not sent when the core has none but its own."""

    ranks: list[RankHealth]


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The core failed, and why; it exits right after this."""

    kind: ErrorKind
    message: str


@dataclass(frozen=True, slots=True)
class AbortRequests:
    """Abort these requests, e.g. after a client disconnect; ids unknown to the core (already ended) are ignored."""

    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Read an adapter before there are requests for it; `AdapterLoaded` says what came of it."""

    adapter: LoraAdapter


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Free the memory of an adapter, once it has no requests."""

    adapter: LoraAdapter


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    """An adapter was read, or is going to be with its first request where there is no room now; `error`: why it cannot be."""

    adapter: LoraAdapter
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ResetPrefixCache:
    """Let no later request find what is cached; requests that share blocks keep them."""


@dataclass(frozen=True, slots=True)
class TraceSteps:
    """Send `EngineTrace` from now on, or no longer; `kernels`: also what runs on the ranks, which slows them down."""

    is_on: bool
    kernels: bool = False


@dataclass(frozen=True, slots=True)
class TracedRow:
    """A request's part of a step: `num_tokens` ran after the `num_computed` that were computed, the last `num_drafts` of them
    drafts; `num_new` tokens came out, with drafts the accepted ones and the one after them."""

    request_id: str
    num_computed: int
    num_tokens: int
    num_drafts: int
    num_new: int


@dataclass(frozen=True, slots=True)
class TracedStep:
    """A step that was done. `submitted`: monotonic seconds; `seconds`: until its result was applied; the rest as it is then.

    `num_preempted`: requests that lost their blocks since the step before. `ended`: requests that ended, and why.
    """

    step: int
    submitted: float
    seconds: float
    num_waiting: int
    num_preempted: int
    rows: list[TracedRow]
    ended: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class TracedBlocks:
    """The state of the KV blocks from number `first` on, a byte each: "." free, "c" cached, "u" in use, "s" shared.

    `holders`: blocks of each running request; empty but at the beginning of the pool.
    """

    first: int
    states: str
    holders: dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class EngineTrace:
    """Steps since the last such message, and a part of the KV cache. `now`: monotonic seconds of its making.

    `arrivals`: requests that were in no message before, and when they came in monotonic seconds; `waiting`: those that hold no
    request slot, in no particular order, at most `step_recorder.MAX_WAITING`.
    `kernels`: about once a second, where they were asked for; `num_lost_kernels`: more that are not in it.
    """

    now: float
    steps: list[TracedStep]
    blocks: TracedBlocks
    arrivals: list[tuple[str, float]] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    kernels: list[TracedKernel] = field(default_factory=list)
    num_lost_kernels: int = 0


@dataclass(frozen=True, slots=True)
class Reconfigure:
    """Settings of the engine that are other from the next step on, by their names; see `EngineClient.reconfigure`."""

    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reconfigured:
    """The answer to `Reconfigure`: why nothing has changed, empty where all has."""

    error: str = ""


@dataclass(frozen=True, slots=True)
class Sleep:
    """Give back weights and KV cache; see `EngineClient.sleep`. The core must be idle, else it stays awake."""

    level: int


@dataclass(frozen=True, slots=True)
class WakeUp:
    """Take weights and KV cache again."""


@dataclass(frozen=True, slots=True)
class SleepState:
    """The answer to `Sleep` and `WakeUp`: the level at which the core sleeps, 0 when it is awake.

    `error`: why it does not do what it was asked.
    """

    level: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the core; requests in it are aborted."""
