"""A request in the scheduler: its record, tokens, computed tokens, blocks, finish reason."""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple, Protocol

from pagoda.errors import ErrorKind
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason, TokenLogprobs
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.block_pool import BlockLease


class Flow(NamedTuple):
    """A tenant's requests of one fairness id, which share the tenant's part of the engine with those of its others."""

    tenant: str
    fairness_id: str


class RequestStatus(Enum):
    """The status of a request. There is no prefill or decode status: `num_computed_tokens` is its progress."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class OutputConstraint(Protocol):
    """What an output keeps to (`pagoda.structured`). The tokens that may be sampled come with each plan (`TokenMasks`)."""

    @property
    def error(self) -> str | None:
        """Why the output cannot be completed; None as long as it can."""

    def advance(self, token_id: int) -> bool:
        """Take a token of the output; whether the output is complete, so that nothing may follow."""

    def forced_tokens(self) -> list[int]:
        """The tokens that come next where there is no choice, as far as is known without a mask."""


class Request:
    """Mutable state of one sequence; `spec` is the request record.

    `max_tokens` is `spec.max_tokens`, or less where the KV cache cannot hold that. `token_ids` is the prompt followed by the
    output so far. `num_computed_tokens` counts tokens whose KV is written, or will be when the steps in flight have run: it
    advances when a step is planned. `num_in_flight` counts sampled tokens that a planned step will deliver but that are not
    yet known:

        token_ids:          [ prompt …………… | output … ] [ in flight ]
        computed:           ────────────────────────────────▶
        to be scheduled:     num_tokens + num_in_flight - num_computed_tokens

    Drafts count as computed and in flight until their step's result is known; then `num_computed_tokens` falls back by those
    that were refused. Their blocks stay: the next tokens go there.

    With `waits_for_output`, as of pipeline stages and of a `constraint`, and `speculates` it is not planned again while tokens
    are in flight: what is planned next depends on them, on how many there are, and on the drafts that follow.
    """

    __slots__ = (
        "block_hashes",
        "constraint",
        "draft_state",
        "error",
        "error_kind",
        "finish_reason",
        "flow",
        "is_complete",
        "is_repetitive",
        "leases",
        "max_tokens",
        "num_accepted_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_draft_tokens",
        "num_in_flight",
        "num_preemptions",
        "num_prompt_tokens",
        "num_published_blocks",
        "num_ready_tokens",
        "num_shared_blocks",
        "prompt_logprobs",
        "req_index",
        "scheduled_time",
        "sequence_number",
        "spec",
        "speculates",
        "status",
        "stop_ids",
        "stop_reason",
        "token_ids",
        "waits_for_output",
    )

    def __init__(self, spec: EngineRequest, constraint: OutputConstraint | None = None) -> None:
        self.spec = spec
        self.constraint = constraint
        self.max_tokens = spec.max_tokens
        self.token_ids = spec.prompt_token_ids + spec.output_token_ids
        if constraint is not None:
            for token_id in spec.output_token_ids:
                constraint.advance(token_id)
        self.num_prompt_tokens = len(spec.prompt_token_ids)
        self.sequence_number = -1  # order of arrival, given by the scheduler
        self.flow = Flow(spec.tenant, "")  # whose share it has, given by the scheduler

        self.status = RequestStatus.WAITING
        self.req_index = -1
        self.leases: tuple[BlockLease, ...] = ()  # one a group of layers while it runs
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.num_ready_tokens = 0  # that can be computed before `KVCacheManager.advance` has anything to do
        self.num_published_blocks = 0
        self.num_shared_blocks = 0  # found in the prefix cache at its last admission
        self.block_hashes: list[bytes] = []
        self.num_preemptions = 0
        self.is_repetitive = False
        self.is_complete = False  # ended by its constraint: its last token is none that ends an output
        self.waits_for_output = False
        self.speculates = False  # drafts may be made for it
        self.draft_state: object = None  # what the proposer of drafts keeps of this request
        self.num_draft_tokens = 0  # that were verified
        self.num_accepted_tokens = 0  # of these
        self.num_cached_tokens = 0
        self.scheduled_time: float | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        # The ids that end generation, and which of them the client named (those are reported as `stop_reason`).
        self.stop_ids: frozenset[int] = frozenset()
        params = spec.params
        if isinstance(params, SamplingParams):
            self.prompt_logprobs = None if params.prompt_logprobs is None else [None]
            self.stop_ids = frozenset(params.stop_token_ids) | (
                frozenset() if params.ignore_eos else frozenset(spec.eos_token_ids)
            )
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error_kind: ErrorKind | None = None
        self.error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Known output tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_blocks(self) -> int:
        """KV blocks that it holds."""
        return sum(lease.num_held for lease in self.leases)

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended: finished, aborted or failed."""
        return self.status is RequestStatus.FINISHED

    @property
    def must_wait_for_output(self) -> bool:
        """Whether it can be planned again only when the tokens in flight are known."""
        return self.num_in_flight > 0 and (self.waits_for_output or self.speculates)

    def next_tokens(self) -> int:
        """Tokens that could be computed now.

        0 while it must wait for its output, and while all output that is still allowed is in flight, so the length limit
        never costs a wasted step.
        """
        if self.num_in_flight and self.must_wait_for_output:
            return 0
        expected = len(self.token_ids) + self.num_in_flight
        if expected - self.num_prompt_tokens >= self.max_tokens:
            return 0
        return expected - self.num_computed_tokens

    def append_output(self, token_id: int) -> None:
        """Take one sampled token and decide whether it ends the request.

        The length limit comes first and nothing overrides it: not `min_tokens`, not `ignore_eos`. `max_tokens` was limited to
        `max_model_len` when the request was accepted.
        """
        self.token_ids.append(token_id)
        num_output = len(self.token_ids) - self.num_prompt_tokens
        if num_output >= self.max_tokens:
            self.finish_reason = FinishReason.LENGTH
        if token_id in self.stop_ids and num_output >= self.spec.sampling.min_tokens:
            # A stop token at the very last position is still a stop: the text is complete.
            self.finish_reason = FinishReason.STOP
            if token_id in self.spec.sampling.stop_token_ids:
                self.stop_reason = token_id
        if self.constraint is not None:
            self._advance(self.constraint, token_id)

    def _advance(self, constraint: OutputConstraint, token_id: int) -> None:
        """Let the constraint of the output end the request: complete, or with an error."""
        if constraint.advance(token_id):
            self.finish_reason = FinishReason.STOP
            self.is_complete = token_id not in self.stop_ids and token_id not in self.spec.eos_token_ids
        elif constraint.error is not None and self.finish_reason is None:
            self.finish_reason = FinishReason.ERROR
            self.error_kind, self.error = ErrorKind.INVALID_REQUEST, constraint.error

    def collect_prompt_logprobs(self, num_computed: int, entries: list[TokenLogprobs]) -> None:
        """Keep the entries, of positions from `num_computed + 1` on, that are new: a preempted request computes some again."""
        assert self.prompt_logprobs is not None
        known = len(self.prompt_logprobs)
        self.prompt_logprobs.extend(entries[max(0, known - num_computed - 1) :])

    def __repr__(self) -> str:
        return f"Request({self.spec.request_id}, {self.status.name}, {self.num_computed_tokens}/{self.num_tokens})"
