"""A small model that drafts for the large one (Leviathan et al., 2023)."""

from __future__ import annotations

from typing_extensions import override

from pagoda.execution.drafter import DraftedRow, Drafter
from pagoda.execution.model_runner import ModelRunner, PendingStep
from pagoda.scheduling.plan import StepPlan


class DraftModel(Drafter):
    """`runner` runs the small model on the request slots, and with the sampler, of the large model's runner."""

    def __init__(self, runner: ModelRunner, max_num_batched_tokens: int) -> None:
        super().__init__(runner.batch, max_num_batched_tokens)
        self._runner = runner

    @override
    def observe(self, plan: StepPlan, step: PendingStep) -> None:
        pass  # it reads tokens only

    @override
    def end_of(self, row: DraftedRow) -> int:
        return row.num_known

    @override
    def run(self, plan: StepPlan, drafts: list[list[int]]) -> list[list[int]]:
        inputs = self.batch.build(plan, self._runner.graphs)
        if inputs is None:
            return [[] for _ in plan.req_indices]
        return self._runner.compute(plan, inputs, {}).result().sampled_token_ids
