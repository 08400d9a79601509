"""The plan of one step, which the scheduler gives the executor, and its result.

Requests live in request slots. The scheduler gives a running request a request slot in `[0, max_num_seqs)` and the model
runner keeps the request's token ids, block table and sampling state in row `req_index` of preallocated arrays. So a plan
holds only what changed, and its size does not grow with context length.

    row i of the batch:   req_indices[i]   num_computed_tokens[i]   num_scheduled_tokens[i]   samples[i]
                             │                │                        │
    token_pool[req_index]:   [ computed ………… │ scheduled in this step │ … ]     tokens computed..computed+scheduled-1 run;
                                                                       a row with samples[i] then writes its sampled token
                                                                       at position computed+scheduled

Speculative decoding: the last k of a row's scheduled tokens may be drafts. Each of them, and the token before them, is a
position whose next token is sampled, 1 + k in all. What was sampled counts as long as it equals the draft that stood there:

    position            n-1     n     n+1    n+2    n+3        n tokens are known, k = 3 drafts, 4 tokens run
    token               t       d0    d1     d2
    sampled there       d0      d1    x      y                 d0 and d1 are right, so x is what follows them; y is dropped
    sampled_token_ids           d0    d1     x                 what plain decoding gives, in one step instead of three
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pagoda.pooling.output import PooledOutput
from pagoda.request import EngineRequest
from pagoda.sampling.output import TokenLogprobs


@dataclass(slots=True)
class NewRequest:
    """A request that enters a request slot: new, or resumed after preemption (then `output_token_ids` is its output so far).

    `block_ids` are, for each group of layers, all blocks it holds, in order; `num_computed_tokens` of its tokens are already
    in them (prefix hit).
    """

    req_index: int
    spec: EngineRequest
    output_token_ids: list[int]
    block_ids: list[list[int]]
    num_computed_tokens: int

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output so far."""
        return self.spec.prompt_token_ids + self.output_token_ids


@dataclass(slots=True)
class NewBlocks:
    """Blocks that a request in a request slot has got: they follow the first `offset` ones of its block table of `group`."""

    req_index: int
    group: int
    offset: int
    block_ids: list[int]


@dataclass(slots=True)
class TokenMasks:
    """Which tokens may be sampled in rows that are constrained: of each row of `rows` (of the plan, ascending) one mask, or
    with k drafts 1 + k. `words`: int32 `[masks, words a mask]`, see `KernelBackend.apply_token_bitmask`.
    """

    rows: list[int]
    words: memoryview = field(default_factory=lambda: memoryview(b""))

    def settled(self) -> TokenMasks:
        """The same, with the words in place; waits for those that are still being found."""
        return self


@dataclass(slots=True)
class StepPlan:
    """One step. The parallel lists have one entry for each scheduled request, in batch order.

    `released_req_indices` were left by their requests since the last plan; they are released before `new_requests` enter.
    `new_blocks` are appended to the block tables of rows, after those of `NewRequest.block_ids`.
    `draft_token_ids[i]` are the drafts of a row that samples and has any: the last ones of its scheduled tokens.

    `token_masks` are those of the rows that are constrained, None where none is.
    `num_drafts_wanted[i]`: a draft model on the ranks follows row i, and makes so many drafts for its request's next step.
    `drafter_rests`: no drafts are wanted soon, so whatever makes them need not see this step.

    Multi-step scheduling (`num_scheduler_steps`): in a plan in which every row samples one token, row i may run `num_steps[i]`
    steps, each on the token sampled by the one before; its blocks are allocated. Otherwise, and with drafts, `num_steps` is
    empty.
    """

    step_id: int
    released_req_indices: list[int] = field(default_factory=list)
    new_requests: list[NewRequest] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    req_indices: list[int] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    num_scheduled_tokens: list[int] = field(default_factory=list)
    new_blocks: list[NewBlocks] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    draft_token_ids: dict[int, list[int]] = field(default_factory=dict)
    num_drafts_wanted: dict[int, int] = field(default_factory=dict)
    drafter_rests: bool = False
    num_steps: list[int] = field(default_factory=list)
    token_masks: TokenMasks | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens that run through the model in this step."""
        return sum(self.num_steps) if self.num_steps else sum(self.num_scheduled_tokens)

    def nth_step(self, index: int) -> tuple[list[int], StepPlan]:
        """The rows that run a step number `index` (the plan itself is number 0), and the plan of that step."""
        rows = [row for row, length in enumerate(self.num_steps) if length > index]
        plan = StepPlan(
            step_id=self.step_id,
            request_ids=[self.request_ids[row] for row in rows],
            req_indices=[self.req_indices[row] for row in rows],
            num_computed_tokens=[self.num_computed_tokens[row] + index for row in rows],
            num_scheduled_tokens=[1] * len(rows),
            samples=[True] * len(rows),
        )
        return rows, plan


@dataclass(frozen=True, slots=True)
class SampledTokensUpdate:
    """Tokens that the last pipeline stage sampled, on their way to the token pools of all ranks.

    Token `token_ids[i]` is at position `positions[i]` of the request in `req_indices[i]`. They go with a plan and are
    written before anything else of it is done. Empty with one stage: its ranks exchange what was sampled among themselves.
    """

    req_indices: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


NO_SAMPLED_TOKENS = SampledTokensUpdate()


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """How unevenly rows chose experts, in the layers of the rank that samples, over some seconds.

    `imbalance`: rows of the expert that was chosen most by those of the average one, 1 where all are alike, the mean of the
    layers; `worst_imbalance`: the layer in which it is greatest. `idle_share`: of the experts, those that no row chose.
    `rank_imbalance`: rows of the rank with most by the average rank's, where ranks have some of the experts each.
    """

    imbalance: float
    worst_imbalance: float
    idle_share: float
    rank_imbalance: float


@dataclass(slots=True)
class StepResult:
    """The result of a plan; rows are indices into the plan's parallel lists.

    `sampled_token_ids[i]`: the ids sampled for row i, several where it runs several steps, or where drafts were accepted: then
    these and the one after them; empty where the row does not sample or has failed. `logprobs[i]`: one entry a sampled id,
    only for rows that asked. `prompt_logprobs[i]`: for a row that asked, entries for the prompt positions `computed+1 ..
    computed+scheduled` that this step predicted (the first prompt token has none). `errors[i]`: the row failed alone, and why;
    it may not have written its KV. `pooled[i]`: what a row that pools gives. `draft_token_ids[i]`: what the draft model
    expects behind the last sampled id of row i; `draft_passes`: the tokens of each of its passes, and the seconds, which are
    part of the step's time. `expert_load`: of a mixture of experts, every few seconds.
    """

    step_id: int
    sampled_token_ids: list[list[int]]
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    pooled: dict[int, PooledOutput] = field(default_factory=dict)
    draft_token_ids: dict[int, list[int]] = field(default_factory=dict)
    draft_passes: list[tuple[int, float]] = field(default_factory=list)
    expert_load: ExpertLoad | None = None
