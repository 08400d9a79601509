"""The scheduler of a model that pools: a request is done when its prompt is computed."""

from __future__ import annotations

from typing_extensions import override

from pagoda.errors import ErrorKind
from pagoda.sampling.output import FinishReason
from pagoda.scheduling.plan import StepResult
from pagoda.scheduling.planned_step import PlannedStep
from pagoda.scheduling.request import Request
from pagoda.scheduling.scheduler import RequestUpdate, Scheduler


class PoolingScheduler(Scheduler):
    """A prompt may be as long as `max_model_len`, for no token follows it."""

    @override
    def _longest_prompt(self) -> int:
        return min(self.limits.max_model_len, self.kv.max_tokens_of_a_request - 1)

    @override
    def _take_output(self, request: Request, row: int, result: StepResult) -> RequestUpdate:
        pooled = result.pooled.get(row)
        request.finish_reason = FinishReason.STOP
        if pooled is None:
            request.finish_reason = FinishReason.ERROR
            request.error_kind, request.error = ErrorKind.INTERNAL, "the step gave no output for this request"
        self._finish(request)
        return RequestUpdate(request, [], pooled=pooled)


class EncoderScheduler(PoolingScheduler):
    """Prompts are computed whole, in one step: each token sees those after it, too.

    So a request holds its slot for one step, nothing is preempted, and the next in turn waits where the step has no room
    for all of it. One that is longer than what is left of the budget after out-of-memory runs alone.
    """

    @override
    def _admit_claims(self) -> None:
        """Tenants take turns at each step: none has rows that hold another back for longer."""

    @override
    def _room_for(self, request: Request, room: int, step: PlannedStep) -> int:
        num_tokens = request.num_tokens
        return num_tokens if num_tokens <= room or not step.requests else 0
