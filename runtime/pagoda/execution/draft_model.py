"""A small model that drafts for the large one, on the rank that samples.

Its KV cache has the same blocks: a block that a request holds, shares or finds in the prefix cache has keys and values of both
models. After a step of the large model it computes the tokens that have become known, and from there generates drafts one by
one, all rows together, sampled as the large model's tokens are: with the same parameters, the same noise, the same tokens
before. So the two agree wherever their distributions do, at any temperature.

    large model     … t d d d        verified: t d d x
    draft model           d d x ─▶ e ─▶ f ─▶ g        drafts of the next step

Nothing of this can change an output: a wrong draft, or keys that are missing since it did not follow for a while, are refused.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from pagoda.execution.executor import StepHandle
from pagoda.execution.model_runner import ModelRunner
from pagoda.scheduling.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class CompletedStep:
    """A step whose result is there."""

    outcome: StepResult

    def result(self) -> StepResult:
        return self.outcome


@dataclass(slots=True)
class _Row:
    """A row of the plan that the draft model follows."""

    plan_row: int
    req_index: int
    num_known: int  # tokens
    num_wanted: int  # drafts


class DraftModel:
    """`runner` runs the small model on the request slots, and with the sampler, of the large model's runner."""

    def __init__(self, runner: ModelRunner, max_num_batched_tokens: int) -> None:
        self._runner = runner
        self._max_num_batched_tokens = max_num_batched_tokens
        # Tokens of each request slot whose keys and values it has.
        self._num_computed = np.zeros(len(runner.batch.num_tokens), dtype=np.int64)

    def follow(self, plan: StepPlan, step: StepHandle) -> StepHandle:
        """Wait for `step`, the large model's, and add the drafts that `plan` wants to its result."""
        for new in plan.new_requests:
            self._num_computed[new.req_index] = new.num_computed_tokens
        if not plan.num_drafts_wanted:
            return step
        # The last token known before may have had no block yet.
        for row in plan.num_drafts_wanted:
            req_index = plan.req_indices[row]
            self._num_computed[req_index] = min(self._num_computed[req_index], plan.num_computed_tokens[row])
        result = step.result()
        began = time.perf_counter()
        result.draft_token_ids = self._make_drafts(plan, result)
        result.draft_seconds = time.perf_counter() - began
        return CompletedStep(result)

    @torch.inference_mode()
    def _make_drafts(self, plan: StepPlan, result: StepResult) -> dict[int, list[int]]:
        rows = [_row_of(plan, result, row) for row in plan.num_drafts_wanted if row not in result.errors]
        begins, ends = self._what_is_missing(rows)
        drafts: dict[int, list[int]] = {row.plan_row: [] for row in rows}
        # All rows at once: one may share blocks that another fills in this step.
        wants = [row.num_wanted > 0 and end == row.num_known for row, end in zip(rows, ends, strict=True)]
        while rows:
            sampled = self._run(rows, begins, ends, wants)
            for row, token_ids in zip(rows, sampled, strict=True):
                drafts[row.plan_row] += token_ids
            rows = [
                row
                for row, token_ids in zip(rows, sampled, strict=True)
                if token_ids and len(drafts[row.plan_row]) < row.num_wanted
            ]
            ends = [row.num_known + len(drafts[row.plan_row]) for row in rows]
            begins = [end - 1 for end in ends]
            wants = [True] * len(rows)
        return {row: token_ids for row, token_ids in drafts.items() if token_ids}

    def _what_is_missing(self, rows: list[_Row]) -> tuple[list[int], list[int]]:
        """From where to where the known tokens of each row are to be computed now: all, or what a step may have of them."""
        left = self._max_num_batched_tokens
        begins: list[int] = []
        ends: list[int] = []
        for row in rows:
            begin = min(int(self._num_computed[row.req_index]), row.num_known - 1)
            # Where nothing is left of the budget, one token is run all the same, as every row of a plan does.
            end = min(row.num_known, begin + max(1, left))
            left -= end - begin
            self._num_computed[row.req_index] = end
            begins.append(begin)
            ends.append(end)
        return begins, ends

    def _run(self, rows: list[_Row], begins: list[int], ends: list[int], samples: list[bool]) -> list[list[int]]:
        """Run the tokens from `begins` to `ends` of each row; returns the token sampled behind each that `samples`."""
        plan = StepPlan(
            step_id=0,
            req_indices=[row.req_index for row in rows],
            num_computed_tokens=begins,
            num_scheduled_tokens=[end - begin for begin, end in zip(begins, ends, strict=True)],
            new_block_ids=[[]] * len(rows),
            block_offsets=[0] * len(rows),
            samples=samples,
        )
        inputs = self._runner.batch.build(plan, self._runner.graphs)
        if inputs is None:
            return [[] for _ in rows]
        return self._runner.compute(plan, inputs, {}).result().sampled_token_ids


def _row_of(plan: StepPlan, result: StepResult, row: int) -> _Row:
    sampled = result.sampled_token_ids[row]
    num_run = plan.num_scheduled_tokens[row] - len(plan.draft_token_ids.get(row, ()))
    num_known = plan.num_computed_tokens[row] + num_run + len(sampled)
    return _Row(row, plan.req_indices[row], num_known, plan.num_drafts_wanted[row] if sampled else 0)
