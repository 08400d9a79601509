"""Tokens beyond the next one: what rows that sample do more than that, within one plan.

`Lookahead.extend` gets a step when all rows are planned, so it takes only what is left: of the token budget, and blocks that
are free. Nothing is preempted for it, and no request waits for it.

    MultiStep      every row runs several model steps on one plan                     x ─▶ y ─▶ z
    Speculation    a row verifies drafts of what follows, all in one model step       x y? z? ─▶ y z a
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from typing_extensions import override

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

    def remove(self, request: Request) -> None:
        """A request has ended."""


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


class Proposer(Protocol):
    """Where drafts come from (`pagoda.speculation`)."""

    def add(self, request: Request) -> None:
        """A request was accepted; sets `speculates` if drafts may be made for it."""

    def propose(
        self, requests: Sequence[Request], limits: Sequence[int], num_outputs: int, num_tokens: int
    ) -> Sequence[Sequence[int]]:
        """For each of these requests, whose tokens are all known, as many tokens that may follow them as are worth verifying.

        `limits`: the most that each may have. `num_outputs` and `num_tokens`: the rows that sample and the tokens, of the
        step without drafts. Ids are within the vocabulary.
        """

    def wanted(self, requests: Sequence[Request], num_outputs: int) -> Sequence[int | None]:
        """Of each of these requests how many drafts the ranks should make for its next step, 0 to follow it only; None where
        no draft model is needed, or not now."""

    def receive(self, request: Request, draft_token_ids: list[int]) -> None:
        """The ranks have made drafts that follow the request's known tokens."""

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens, drafts included, all of whose rows sampled, took so long without its draft model."""

    def observe_drafting(self, num_drafts: int, seconds: float) -> None:
        """Making up to so many drafts of each row took so long."""

    def remove(self, request: Request) -> None:
        """A request has ended; its tokens are still there."""


class Speculation(Lookahead):
    """Rows that sample verify drafts: see `StepPlan`.

    Drafts take what is left of a step's budget, up to `max_draft_tokens`, and never a block that another running request may
    need for its next token: at least so many are left as requests run.
    """

    def __init__(
        self, kv: KVCacheManager, proposer: Proposer, max_draft_tokens: int, otherwise: Lookahead | None = None
    ) -> None:
        """`otherwise`: what a step does in which no row has drafts."""
        self._kv = kv
        self._proposer = proposer
        self._max_draft_tokens = max_draft_tokens
        self._otherwise = otherwise or Lookahead()

    @override
    def add(self, request: Request) -> None:
        self._proposer.add(request)

    @override
    def remove(self, request: Request) -> None:
        self._proposer.remove(request)

    @override
    def receive(self, request: Request, draft_token_ids: list[int]) -> None:
        self._proposer.receive(request, draft_token_ids)

    @override
    def extend(self, step: PlannedStep, num_tokens: int, num_running: int) -> None:
        self._add_drafts(step, num_tokens, num_running)
        self._want_drafts(step, num_running)
        if not step.plan.draft_token_ids:
            self._otherwise.extend(step, num_tokens, num_running)

    @override
    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        num_outputs = sum(plan.samples) + sum(map(len, plan.draft_token_ids.values()))
        if num_outputs == plan.total_tokens and not plan.num_steps:
            self._proposer.observe(num_outputs, seconds - result.draft_seconds)
            if plan.num_drafts_wanted:
                self._proposer.observe_drafting(max(plan.num_drafts_wanted.values()), result.draft_seconds)

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
        limits = [min(left, request.max_tokens - request.num_output_tokens - 1) for request in requests]
        proposals = self._proposer.propose(requests, limits, sum(plan.samples), num_step_tokens)
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
        for row, count in zip(rows, wanted, strict=True):
            if count is None:
                continue
            request = step.requests[row]
            if plan.samples[row]:
                # If all drafts of this step are right, as many tokens follow as are in flight now.
                count = min(count, request.max_tokens - request.num_output_tokens - request.num_in_flight - 1)
                self._kv.extend_for_drafts(request, 1 + count, num_running)
                step.send_blocks(row)
                plan.num_drafts_wanted[row] = max(0, count)
            else:
                plan.num_drafts_wanted[row] = 0
