"""What drafts cost, measured before the engine is ready: steps of few and of many tokens, and passes of the draft model.

So the first request begins with prices, and one for whom drafts cannot pay does not pay for finding that out. Requests of no
client run in the null block, whose contents are never read, and leave their request slots before anybody enters.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.plan import NewRequest, StepPlan, StepResult
from pagoda.scheduling.scheduler import Scheduler

Run = Callable[[StepPlan], StepResult]

_SECONDS = 0.5  # after which no further size is begun
_REPEATS = 5
_BATCHES = (4, 16, 64, 256)
_PROMPT = 8


def calibrate(run: Run, scheduler: Scheduler, *, block_size: int, num_groups: int) -> None:
    """Run steps with `run`, on an executor that is ready, and let `scheduler` know how long they took.

    `num_groups`: of layers, see `kv_groups`. Raises what a step raises.
    """
    limits = scheduler.limits
    steps = _Steps(run, scheduler, -(-limits.max_model_len // block_size), num_groups)
    # Each step may move a row forward by all its drafts and one token.
    room = (limits.max_model_len - _PROMPT - _REPEATS) // (2 * _REPEATS) - 1
    num_drafts = min(limits.num_speculative_tokens, limits.max_num_batched_tokens - 1, room)
    if num_drafts < 1:
        return
    began = time.monotonic()
    sizes = [size for size in _BATCHES if size <= min(limits.max_num_seqs, limits.max_num_batched_tokens // _PROMPT)]
    for num_rows in (1, *sizes):
        if num_rows > 1 and time.monotonic() - began > _SECONDS:
            break
        steps.enter(num_rows)
        for _ in range(_REPEATS):  # in turn, so that both meet the same machine
            steps.run()
            steps.run(num_drafts=num_drafts if num_rows == 1 else 0, num_wanted=num_drafts if num_rows == 1 else 1)
    steps.leave()


@dataclass
class _Steps:
    """Rows 0, 1, … of a batch, in the request slots of these numbers."""

    run_plan: Run
    scheduler: Scheduler
    num_blocks: int
    num_groups: int
    num_tokens: list[int] = field(default_factory=list)  # of each row, the last one not computed yet
    step_id: int = 0

    def enter(self, num_rows: int) -> None:
        """Let the batch grow to so many rows."""
        first = len(self.num_tokens)
        plan = self._plan(list(range(first, num_rows)), [0] * (num_rows - first), [_PROMPT] * (num_rows - first))
        plan.new_requests = [
            NewRequest(
                req_index=index,
                spec=EngineRequest(
                    request_id=f"calibration-{index}",
                    params=SamplingParams(temperature=0.0),
                    prompt_token_ids=[0] * _PROMPT,
                    max_tokens=1,
                ),
                output_token_ids=[],
                block_ids=[[0] * self.num_blocks] * self.num_groups,
                num_computed_tokens=0,
            )
            for index in plan.req_indices
        ]
        self._run(plan)
        self.num_tokens += [_PROMPT + 1] * (num_rows - first)

    def run(self, num_drafts: int = 0, num_wanted: int = 0) -> None:
        """One token of each row, and drafts that are probably wrong; make so many drafts of each."""
        rows = list(range(len(self.num_tokens)))
        computed = [known - 1 for known in self.num_tokens]
        plan = self._plan(rows, computed, [1 + num_drafts] * len(rows))
        if num_drafts:
            plan.draft_token_ids = {row: [0] * num_drafts for row in rows}
        if num_wanted:
            plan.num_drafts_wanted = dict.fromkeys(rows, num_wanted)
        began = time.monotonic()
        result = self._run(plan)
        if not result.errors:
            self.scheduler.calibrate(plan, result, time.monotonic() - began)
        for row, sampled in enumerate(result.sampled_token_ids):
            self.num_tokens[row] += len(sampled)

    def leave(self) -> None:
        """Release the request slots."""
        self._run(StepPlan(step_id=self.step_id, released_req_indices=list(range(len(self.num_tokens)))))

    def _plan(self, req_indices: list[int], computed: list[int], scheduled: list[int]) -> StepPlan:
        return StepPlan(
            step_id=self.step_id,
            request_ids=[f"calibration-{index}" for index in req_indices],
            req_indices=req_indices,
            num_computed_tokens=computed,
            num_scheduled_tokens=scheduled,
            samples=[True] * len(req_indices),
        )

    def _run(self, plan: StepPlan) -> StepResult:
        self.step_id += 1
        return self.run_plan(plan)
