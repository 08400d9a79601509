"""Tokens beyond the next one: what rows that sample do more than that, within one plan.

`Lookahead.extend` gets a step when all rows are planned, so it takes only what is left: of the token budget, and blocks that
are free. Nothing is preempted for it, and no request waits for it.

    MultiStep      every row runs several model steps on one plan                     x ─▶ y ─▶ z
    Speculation    a row verifies drafts of what follows, all in one model step       x y? z? ─▶ y z a
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override

from pagoda.config.speculation import MAX_SPECULATIVE_TOKENS
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.plan import StepPlan, StepResult
from pagoda.scheduling.planned_step import PlannedStep
from pagoda.scheduling.request import Request


class Lookahead:
    """None: every row samples one token at most."""

    def add(self, request: Request) -> None:
        """A request was accepted."""

    def extend(self, step: PlannedStep, num_tokens: int, num_running: int) -> None:
        """Let rows of `step`, which may hold `num_tokens` tokens, do more; `num_running` requests hold blocks."""

    def receive(self, request: Request, draft_token_ids: list[int]) -> None:
        """The draft model has made drafts that follow the request's known tokens."""

    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """The turn of the engine's loop that ran `plan` took so long."""

    def calibrate(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """A plan of no request, which was run to be measured, took so long."""

    def remove(self, request: Request) -> None:
        """A request has ended."""

    def configure(self, limits: SchedulerLimits) -> None:
        """Work within other limits from the next plan on, none of them above those of the start."""


class MultiStep(Lookahead):
    """`num_scheduler_steps`: a plan in which every row decodes runs so many model steps."""

    def __init__(self, limits: SchedulerLimits, kv: KVCacheManager) -> None:
        self._limits = limits
        self._kv = kv

    @override
    def extend(self, step: PlannedStep, num_tokens: int, num_running: int) -> None:
        """Extend every row up to `num_scheduler_steps` steps, its length limit, and the blocks that are free.

        Tokens sampled past the end of a request are dropped by `Scheduler.apply`.
        """
        if not step.only_decodes:
            return
        for row, request in enumerate(step.requests):
            allowed = request.max_tokens - request.num_output_tokens - request.num_in_flight
            # What a constrained output allows next is known when its last token is.
            extra = 0 if request.constraint is not None else min(self._limits.num_scheduler_steps - 1, allowed)
            if not self._kv.extend(request, request.num_computed_tokens + extra):
                extra = 0
            step.extend_row(row, extra)


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step that ran.

    `num_outputs`: the rows that sampled, and `num_made` the tokens that they got; `num_drafts`: of `num_tokens` those that
    were drafts; `only_decodes`: no other tokens ran but those whose next one was sampled. `seconds`: of the turn of the
    engine's loop without `draft_passes`, which are those of a draft model: of each its tokens and seconds.
    `seconds_unmeasured`: of the steps before it that were not measured.
    """

    num_outputs: int
    num_tokens: int
    num_drafts: int
    num_made: int
    only_decodes: bool
    seconds: float
    draft_passes: Sequence[tuple[int, float]] = ()
    seconds_unmeasured: float = 0.0

    @classmethod
    def of(cls, plan: StepPlan, result: StepResult, seconds: float, seconds_unmeasured: float = 0.0) -> MeasuredStep:
        """`seconds` with those of the draft model. Of several model steps on one plan each counts alike."""
        num_steps = max(plan.num_steps, default=1)
        if num_steps > 1:
            num_rows = len(plan.num_steps)
            return cls(
                num_outputs=num_rows,
                num_tokens=num_rows,
                num_drafts=0,
                num_made=num_rows,
                only_decodes=plan.total_tokens == num_steps * num_rows,
                seconds=seconds / num_steps,
                seconds_unmeasured=seconds_unmeasured + seconds * (1 - 1 / num_steps),
            )
        num_outputs, num_drafts = sum(plan.samples), sum(map(len, plan.draft_token_ids.values()))
        return cls(
            num_outputs=num_outputs,
            num_tokens=plan.total_tokens,
            num_drafts=num_drafts,
            num_made=sum(map(len, result.sampled_token_ids)),
            only_decodes=num_outputs + num_drafts == plan.total_tokens,
            seconds=seconds - sum(taken for _, taken in result.draft_passes),
            draft_passes=result.draft_passes,
            seconds_unmeasured=seconds_unmeasured,
        )


class Proposer(Protocol):
    """Where drafts come from (`pagoda.speculation`)."""

    resting: int
    """Steps from now on without any drafts: it is neither asked nor told of anything in them but of requests that come and
    go, and of some steps' time. Set by the proposer where drafts do not pay; counted down by who asks."""

    reads_along: bool
    """Whether what makes drafts on the ranks should see the steps in which it makes none."""

    def add(self, request: Request) -> None:
        """A request was accepted; sets `speculates` if drafts may be made for it."""

    def propose(
        self, requests: Sequence[Request], limits: Sequence[int], num_outputs: int, num_tokens: int
    ) -> Sequence[Sequence[int]]:
        """For each of these requests, whose tokens are all known, as many tokens that may follow them as are worth verifying.

        `limits`: the most that each may have. `num_outputs` and `num_tokens`: the rows that sample and the tokens, of the
        step without drafts. Ids are within the vocabulary. Empty: none for any of them.
        """

    def wanted(self, requests: Sequence[Request], num_outputs: int) -> Sequence[int | None]:
        """Of each of these requests how many drafts the ranks should make for its next step, 0 to follow it only; None where
        no draft model is needed, or not now. Empty: for none of them."""

    def receive(self, request: Request, draft_token_ids: list[int]) -> None:
        """The ranks have made drafts that follow the request's known tokens."""

    def observe(self, step: MeasuredStep) -> None:
        """A step has run; of those in which it rests one of several."""

    def calibrate(self, step: MeasuredStep) -> None:
        """A step of no request has run, for its cost to be known."""

    def remove(self, request: Request) -> None:
        """A request has ended; its tokens are still there."""


# Of the steps in which the proposer rests one of so many is measured.
_MEASURED_AT_REST = 8


class Speculation(Lookahead):
    """Rows that sample verify drafts: see `StepPlan`.

    Drafts take what is left of a step's budget, up to `max_draft_tokens`, and never a block that another running request may
    need for its next token: at least so many are left as requests run.

    While the proposer rests, a step is what it is without speculation: nobody waits for its output to be known, and the time
    that is taken here is that of a few comparisons.
    """

    def __init__(
        self, kv: KVCacheManager, proposer: Proposer, max_draft_tokens: int, otherwise: Lookahead | None = None
    ) -> None:
        """`otherwise`: what a step does in which no row has drafts."""
        self._kv = kv
        self._most_drafts = MAX_SPECULATIVE_TOKENS  # of a row
        self._proposer = proposer
        self._max_draft_tokens = max_draft_tokens
        self._otherwise = otherwise or Lookahead()
        # Those that drafts may be made for; while the proposer rests they are as any other.
        self._requests: set[Request] = set()
        self._rests = False
        self._seconds_unmeasured = 0.0

    @override
    def add(self, request: Request) -> None:
        self._proposer.add(request)
        if request.speculates:
            self._requests.add(request)
            request.speculates = not self._rests

    @override
    def remove(self, request: Request) -> None:
        self._requests.discard(request)
        self._proposer.remove(request)

    @override
    def configure(self, limits: SchedulerLimits) -> None:
        self._most_drafts = limits.num_speculative_tokens

    @override
    def receive(self, request: Request, draft_token_ids: list[int]) -> None:
        self._proposer.receive(request, draft_token_ids)

    @override
    def extend(self, step: PlannedStep, num_tokens: int, num_running: int) -> None:
        proposer = self._proposer
        if proposer.resting:
            proposer.resting -= 1
        else:
            if self._rests:
                self._let_rest(False)
            self._add_drafts(step, num_tokens, num_running)
            self._want_drafts(step, num_running)
            if proposer.resting:
                self._let_rest(True)
        step.plan.drafter_rests = not proposer.reads_along
        if not step.plan.draft_token_ids:
            self._otherwise.extend(step, num_tokens, num_running)

    def _let_rest(self, rests: bool) -> None:
        self._rests = rests
        for request in self._requests:
            # One whose drafts are not verified yet has to wait for that.
            request.speculates = not rests or request.num_in_flight > 1

    @override
    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        if plan.draft_token_ids or plan.num_drafts_wanted or not self._proposer.resting % _MEASURED_AT_REST:
            self._proposer.observe(MeasuredStep.of(plan, result, seconds, self._seconds_unmeasured))
            self._seconds_unmeasured = 0.0
        else:
            self._seconds_unmeasured += seconds

    @override
    def calibrate(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        self._proposer.calibrate(MeasuredStep.of(plan, result, seconds))

    def _add_drafts(self, step: PlannedStep, num_tokens: int, num_running: int) -> None:
        """Add drafts to the rows that sample, in order, while there is room for them."""
        plan = step.plan
        # A request whose token before this one is unknown has nothing to draft from.
        rows = [
            row
            for row, request in enumerate(step.requests)
            if request.speculates and plan.samples[row] and request.num_in_flight == 1
        ]
        if not rows:
            return
        requests = [step.requests[row] for row in rows]
        num_step_tokens = plan.total_tokens
        left = min(num_tokens - num_step_tokens, self._max_draft_tokens)
        # The token that a row samples anyway is one of those that are still allowed.
        limits = [
            min(left, self._most_drafts, request.max_tokens - request.num_output_tokens - 1) for request in requests
        ]
        proposals = self._proposer.propose(requests, limits, sum(plan.samples), num_step_tokens)
        if not proposals:
            return
        for row, request, proposal in zip(rows, requests, proposals, strict=True):
            if not proposal or left <= 0:
                continue
            room = self._kv.extend_for_drafts(request, min(left, len(proposal)), num_running)
            if room > 0:
                step.add_drafts(row, list(proposal[:room]))
                left -= room

    def _want_drafts(self, step: PlannedStep, num_running: int) -> None:
        """Say which rows a draft model follows, and give it blocks for what it writes there."""
        plan = step.plan
        rows = [row for row, request in enumerate(step.requests) if request.speculates]
        wanted = self._proposer.wanted([step.requests[row] for row in rows], sum(plan.samples))
        if not wanted:
            return
        for row, count in zip(rows, wanted, strict=True):
            if count is None:
                continue
            request = step.requests[row]
            if plan.samples[row]:
                # If all drafts of this step are right, as many tokens follow as are in flight now.
                count = min(
                    count, self._most_drafts, request.max_tokens - request.num_output_tokens - request.num_in_flight - 1
                )
                room = self._kv.extend_for_drafts(request, 1 + count, num_running)
                plan.num_drafts_wanted[row] = max(0, min(count, room))
            else:
                plan.num_drafts_wanted[row] = 0
