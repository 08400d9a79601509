"""Tokens beyond the next one: what rows that sample do more than that, within one plan.

`Lookahead.extend` gets a step when all rows are planned, so it takes only what is left: of the token budget, and blocks that
are free. Nothing is preempted for it, and no request waits for it.

    MultiStep      every row runs several model steps on one plan                     x ─▶ y ─▶ z
    Speculation    a row verifies drafts of what follows, all in one model step       x y? z? ─▶ y z a
"""

from __future__ import annotations

from typing import Protocol

from typing_extensions import override

from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.planned_step import PlannedStep
from pagoda.scheduling.request import Request


class Lookahead:
    """None: every row samples one token at most."""

    def add(self, request: Request) -> None:
        """A request was accepted."""

    def extend(self, step: PlannedStep, num_tokens: int, num_running: int) -> None:
        """Let rows of `step`, which may hold `num_tokens` tokens, do more; `num_running` requests hold blocks."""

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
            extra = min(self._limits.num_scheduler_steps - 1, allowed)
            if not self._kv.extend(request, request.num_computed_tokens + extra):
                extra = 0
            step.extend_row(row, extra)


class Proposer(Protocol):
    """Where drafts come from (`pagoda.speculation`)."""

    def add(self, request: Request) -> None:
        """A request was accepted; sets `waits_for_output` if drafts may be made for it."""

    def choose(self, requests: list[Request], num_other_tokens: int) -> list[int]:
        """For each of these requests, which sample in a step of `num_other_tokens` tokens without drafts, how many drafts at
        most would make it faster; 0 for none."""

    def propose(self, request: Request, limit: int) -> list[int]:
        """Up to `limit` (at least 1) tokens that may follow the known tokens of `request`, ids within the vocabulary."""

    def remove(self, request: Request) -> None:
        """A request has ended; its tokens are still there."""


class Speculation(Lookahead):
    """Rows that sample verify drafts: see `StepPlan`.

    Drafts take what is left of a step's budget and of `max_draft_tokens`, and never a block that another running request may
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
    def extend(self, step: PlannedStep, num_tokens: int, num_running: int) -> None:
        self._add_drafts(step, num_tokens, num_running)
        if not step.plan.draft_token_ids:
            self._otherwise.extend(step, num_tokens, num_running)

    def _add_drafts(self, step: PlannedStep, num_tokens: int, num_running: int) -> None:
        """Add drafts to the rows that sample, in order, while there is room for them."""
        plan = step.plan
        # A request whose token before this one is unknown has nothing to draft from.
        rows = [
            row
            for row, request in enumerate(step.requests)
            if plan.samples[row] and request.waits_for_output and request.num_in_flight == 1
        ]
        if not rows:
            return
        left = min(num_tokens - plan.total_tokens, self._max_draft_tokens)
        counts = self._proposer.choose([step.requests[row] for row in rows], plan.total_tokens)
        for row, count in zip(rows, counts, strict=True):
            request = step.requests[row]
            # The token that the row samples anyway is one of those still allowed.
            limit = min(count, left, request.max_tokens - request.num_output_tokens - 1)
            drafts = self._proposer.propose(request, limit) if limit > 0 else []
            room = self._kv.extend_for_drafts(request, len(drafts), num_running)
            if drafts and room > 0:
                step.add_drafts(row, drafts[:room])
                left -= min(room, len(drafts))
