"""What drafts on the rank that samples: a small model or a head, in step with the large model.

Its KV cache has the blocks of the large model's first group of layers, which keeps all tokens if one does: a block that a
request holds, shares or finds in the prefix cache has a place for both. (A group of its own would take, for each of its small
blocks, one as large as the model's.) After a step of the large model a drafter computes what has become known, and from there
drafts one by one, all rows together, sampled as the large model's tokens are: with the same parameters, the same noise, the
same tokens before. So the two agree wherever their distributions do, at any temperature.

    large model     … t d d d        verified: t d d x
    drafter               d d x ─▶ e ─▶ f ─▶ g        drafts of the next step

Nothing of this can change an output: a wrong draft is refused. A drafter need not follow every step. What it has not computed
is computed when drafts are wanted again, also where that is in blocks that another request has filled.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from pagoda.execution.executor import StepHandle
from pagoda.execution.input_batch import InputBatch
from pagoda.execution.model_runner import PendingStep
from pagoda.scheduling.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class CompletedStep:
    """A step whose result is there."""

    outcome: StepResult

    def result(self) -> StepResult:
        return self.outcome


@dataclass(slots=True)
class DraftedRow:
    """A row of the plan that the drafter follows. Of its request so many tokens are known, and the large model has computed
    `num_computed` of them."""

    plan_row: int
    req_index: int
    num_known: int
    num_computed: int
    num_wanted: int  # drafts


class Drafter(ABC):
    """Follows the request slots of `batch`. A subclass computes positions; what is known of which is kept here."""

    reads_ahead: ClassVar[int] = 0
    """So many tokens behind a position count for what is computed there. So the last positions of a block that another request
    has filled are computed again: what comes after the block may differ."""

    def __init__(self, batch: InputBatch, max_num_batched_tokens: int) -> None:
        self.batch = batch
        self._max_num_batched_tokens = max_num_batched_tokens
        # Of each request slot: its blocks, and how many positions, from the first on, are computed for certain.
        self._blocks: list[list[int]] = [[] for _ in batch.num_tokens]
        self._num_computed = np.zeros(len(batch.num_tokens), dtype=np.int64)
        # Blocks whose positions are all computed, for whoever shares them. The null block is never read.
        self._is_full = bytearray(batch.num_blocks)
        self._is_full[0] = True

    def follow(self, plan: StepPlan, step: PendingStep) -> StepHandle:
        """Take note of `step`, the large model's; where `plan` wants drafts, wait for it and add them to its result."""
        self._take_blocks(plan)
        if plan.drafter_rests:
            return step
        self.observe(plan, step)
        if not plan.num_drafts_wanted:
            return step
        # The last token known before may have had no block yet.
        for row in plan.num_drafts_wanted:
            req_index = plan.req_indices[row]
            self._num_computed[req_index] = min(self._num_computed[req_index], plan.num_computed_tokens[row])
        result = step.result()
        result.draft_token_ids = self._make_drafts(plan, result)
        return CompletedStep(result)

    @abstractmethod
    def observe(self, plan: StepPlan, step: PendingStep) -> None:
        """`step`, which runs `plan`, was given to the device; not called while it rests, by `StepPlan.drafter_rests`."""

    @abstractmethod
    def end_of(self, row: DraftedRow) -> int:
        """How many positions of the row, from the first on, can be computed now; the last one gives the first draft."""

    @abstractmethod
    def run(self, plan: StepPlan, drafts: list[list[int]]) -> list[list[int]]:
        """Compute the positions of a plan of the drafter's own; returns the token sampled behind each row that samples.

        `drafts`: those that each row of the plan has so far; with any, its one position is that of the last.
        """

    def first_block_of(self, req_index: int) -> int:
        """The blocks of a request before this one are not read: what would be computed there is not known."""
        del req_index
        return 0

    def _take_blocks(self, plan: StepPlan) -> None:
        """Keep the blocks of the request slots; what is in those that are new to them is not computed yet."""
        for req_index in plan.released_req_indices:
            self._blocks[req_index] = []
        for entered in plan.new_requests:
            num_shared = entered.num_computed_tokens // self.batch.block_size
            self._blocks[entered.req_index] = list(entered.block_ids[0])
            self._num_computed[entered.req_index] = 0
            self._empty(entered.block_ids[0][num_shared:])
        for new in plan.new_blocks:
            if new.group == 0:
                self._blocks[new.req_index] += new.block_ids
                self._empty(new.block_ids)

    def _empty(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self._is_full[block_id] = block_id == 0

    @torch.inference_mode()
    def _make_drafts(self, plan: StepPlan, result: StepResult) -> dict[int, list[int]]:
        began = time.perf_counter()
        rows = [_row_of(plan, result, row) for row in plan.num_drafts_wanted if row not in result.errors]
        rows = [row for row in rows if self.end_of(row) > 0]
        drafts: dict[int, list[int]] = {row.plan_row: [] for row in rows}
        begins, ends = self._what_is_missing(rows)
        # All rows at once: one may share blocks that another fills in this step.
        wants = [row.num_wanted > 0 and end == self.end_of(row) for row, end in zip(rows, ends, strict=True)]
        while rows:
            own = StepPlan(
                step_id=0,
                req_indices=[row.req_index for row in rows],
                num_computed_tokens=begins,
                num_scheduled_tokens=[end - begin for begin, end in zip(begins, ends, strict=True)],
                samples=wants,
            )
            sampled = self.run(own, [drafts[row.plan_row] for row in rows])
            began, before = time.perf_counter(), began
            result.draft_passes.append((own.total_tokens, began - before))
            for row, token_ids in zip(rows, sampled, strict=True):
                drafts[row.plan_row] += token_ids
            rows = [
                row
                for row, token_ids in zip(rows, sampled, strict=True)
                if token_ids and len(drafts[row.plan_row]) < row.num_wanted
            ]
            ends = [self.end_of(row) + len(drafts[row.plan_row]) for row in rows]
            begins = [end - 1 for end in ends]
            wants = [True] * len(rows)
        return {row: token_ids for row, token_ids in drafts.items() if token_ids}

    def _what_is_missing(self, rows: list[DraftedRow]) -> tuple[list[int], list[int]]:
        """From where to where each row is to be computed now: to its end, or as far as a step's budget of tokens goes."""
        left = self._max_num_batched_tokens
        begins: list[int] = []
        ends: list[int] = []
        for row in rows:
            begin = min(self._first_missing(row.req_index), self.end_of(row) - 1)
            # Where nothing is left of the budget, one token is run all the same, as every row of a plan does.
            end = min(self.end_of(row), begin + max(1, left))
            left -= end - begin
            self._num_computed[row.req_index] = end
            for block_id in self._blocks[row.req_index][begin // self.batch.block_size : end // self.batch.block_size]:
                self._is_full[block_id] = True
            begins.append(begin)
            ends.append(end)
        return begins, ends

    def _first_missing(self, req_index: int) -> int:
        """The first position that is not computed, by this request or by one that it shares blocks with."""
        block_size, blocks = self.batch.block_size, self._blocks[req_index]
        position = max(int(self._num_computed[req_index]), self.first_block_of(req_index) * block_size)
        index = position // block_size
        if index < len(blocks) and self._is_full[blocks[index]]:
            while index < len(blocks) and self._is_full[blocks[index]]:
                index += 1
            position = index * block_size - self.reads_ahead
        return position


def _row_of(plan: StepPlan, result: StepResult, row: int) -> DraftedRow:
    sampled = result.sampled_token_ids[row]
    num_run = plan.num_scheduled_tokens[row] - len(plan.draft_token_ids.get(row, ()))
    num_known = plan.num_computed_tokens[row] + num_run + len(sampled)
    return DraftedRow(
        row,
        plan.req_indices[row],
        num_known=num_known,
        num_computed=num_known - 1 if sampled else num_known,
        num_wanted=plan.num_drafts_wanted[row] if sampled else 0,
    )
