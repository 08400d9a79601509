"""Drafts made on the host from known tokens, and only as many as pay.

A request has drafters (what its grammar forces, look-up in its own text, or in past outputs too), each with rates of
acceptance; the first that proposes anything counts. Rates are learned from every proposal, verified or not: what a drafter
proposed is compared with what came. So a request for which drafts do not pay costs nothing but the look-ups until they would;
and where these cost too much of a step themselves, they pause. Whatever is believed, `LossBudget` bounds what may be
lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from pagoda.scheduling.lookahead import MeasuredStep
from pagoda.scheduling.request import Request
from pagoda.scheduling.step_cost import StepCost
from pagoda.speculation.acceptance import AcceptanceRates
from pagoda.speculation.draft_count import choose_counts, may_pay
from pagoda.speculation.loss_budget import LossBudget
from pagoda.speculation.plain_steps import PlainSteps

# How much a new observation counts: for a request, and for what the next ones begin with.
_REQUEST_SHARE, _COMMON_SHARE = 0.12, 0.02
# So many observations weigh as much as the rates that a request begins with, and the first guess.
_REQUEST_BELIEF, _COMMON_BELIEF = 8, 3
# The share of a step's time that may go into proposals of which none is used.
_IDLE_SHARE = 0.005
# Steps between two in which drafts are verified that do not seem to pay, to measure what they cost.
_FIRST_TRIAL, _RAREST_TRIAL = 32, 1024


class Drafter(Protocol):
    """Proposes tokens for one request."""

    def propose(self, limit: int) -> Sequence[int]:
        """Up to `limit` tokens that may follow the request's known tokens."""

    def close(self) -> None:
        """The request has ended."""


class _Source:
    """What is known of one of a request's drafters: its rates, and a proposal that is not yet decided."""

    __slots__ = ("begin", "common", "drafter", "pending", "rates")

    def __init__(self, drafter: Drafter, common: AcceptanceRates) -> None:
        """`common`: the rates of all requests."""
        self.drafter = drafter
        self.common = common
        self.rates = common.copy(_REQUEST_SHARE, _REQUEST_BELIEF)
        self.pending: Sequence[int] = ()
        self.begin = 0  # of `pending`, in the request's tokens

    def propose(self, request: Request, limit: int) -> Sequence[int]:
        """Up to `limit` tokens that may follow those of the request."""
        self._settle(request)
        proposal = self.drafter.propose(limit)
        if not self.pending:
            self.pending, self.begin = proposal, request.num_tokens
        return proposal

    def _settle(self, request: Request) -> None:
        """Learn from the pending proposal, once it is known how much of it came true."""
        pending = self.pending
        if not pending:
            return
        came = request.token_ids[self.begin : self.begin + len(pending)]
        num_right = 0
        for proposed, token in zip(pending, came, strict=False):
            if proposed != token:
                break
            num_right += 1
        else:
            if len(came) < len(pending):
                return  # right as far as it is known
        self.pending = ()
        self.rates.observe(len(pending), num_right)
        self.common.observe(len(pending), num_right)


class _State:
    """A request's drafters, and the one whose proposal is this step's."""

    __slots__ = ("chosen", "limit", "sources")

    def __init__(self, sources: Sequence[_Source], limit: int) -> None:
        self.sources = sources
        self.limit = limit
        self.chosen = sources[0]


class HostProposer:
    """A `scheduling.lookahead.Proposer` of drafters that need no model."""

    reads_along = False

    def __init__(
        self,
        num_speculative_tokens: int,
        *make_drafters: Callable[[Request], Drafter],
        on_end: Callable[[Request], None] = lambda request: None,
    ) -> None:
        self._most = num_speculative_tokens
        self._on_end = on_end
        self._cost = StepCost()
        self._drafters = [
            (make, AcceptanceRates.unknown(num_speculative_tokens, _COMMON_SHARE, _COMMON_BELIEF))
            for make in make_drafters
        ]
        self._budget = LossBudget(self._cost)
        self.resting = 0
        self._until_trial = self._trial_interval = _FIRST_TRIAL
        self._plain_steps = PlainSteps(self._cost)

    def add(self, request: Request) -> None:
        limit = request.spec.num_speculative_tokens
        limit = self._most if limit is None else min(limit, self._most)
        if limit:
            request.speculates = True
            request.draft_state = _State([_Source(make(request), common) for make, common in self._drafters], limit)

    def remove(self, request: Request) -> None:
        if isinstance(request.draft_state, _State):
            for source in request.draft_state.sources:
                source.drafter.close()
        request.draft_state = None
        self._on_end(request)

    def wanted(self, requests: Sequence[Request], num_outputs: int) -> Sequence[int | None]:
        return ()

    def receive(self, request: Request, draft_token_ids: list[int]) -> None:
        raise NotImplementedError("no draft model was asked for drafts")

    def calibrate(self, step: MeasuredStep) -> None:
        if step.only_decodes:
            self._cost.observe(step.num_tokens, step.seconds)

    def observe(self, step: MeasuredStep) -> None:
        self._budget.settle(step)
        self.calibrate(step)

    def propose(
        self, requests: Sequence[Request], limits: Sequence[int], num_outputs: int, num_tokens: int
    ) -> list[Sequence[int]]:
        started = time.perf_counter()
        proposals = [self._proposal(request, limit) for request, limit in zip(requests, limits, strict=True)]
        counts = self._counts(requests, proposals, num_outputs, num_tokens)
        if not any(counts):
            # Look again when what was spent in vain is made up for.
            step_seconds = self._cost.seconds(num_tokens)
            spent = time.perf_counter() - started
            self.resting = int(spent / (_IDLE_SHARE * step_seconds)) if step_seconds else 0
        return [proposal[:count] for proposal, count in zip(proposals, counts, strict=True)]

    def _proposal(self, request: Request, limit: int) -> Sequence[int]:
        state = request.draft_state
        if not isinstance(state, _State):
            return ()
        limit = min(limit, state.limit)
        if limit <= 0:
            return ()
        for source in state.sources:
            proposal = source.propose(request, limit)
            if proposal:
                state.chosen = source
                return proposal
        return ()

    def _counts(
        self, requests: Sequence[Request], proposals: list[Sequence[int]], num_outputs: int, num_tokens: int
    ) -> list[int]:
        """How many drafts of each proposal to verify."""
        if not any(proposals) or not self._budget.is_open or self._plain_steps.is_due(num_outputs):
            return [0] * len(proposals)
        if not may_pay(num_outputs, num_tokens, sum(map(len, proposals)), self._cost):
            return self._trial(proposals)
        probabilities = [
            request.draft_state.chosen.rates.all_right_up_to(len(proposal))
            if isinstance(request.draft_state, _State)
            else []
            for request, proposal in zip(requests, proposals, strict=True)
        ]
        counts = choose_counts(probabilities, num_outputs, num_tokens, self._cost)
        if any(counts):
            self._until_trial = self._trial_interval = _FIRST_TRIAL
        return counts if any(counts) else self._trial(proposals)

    def _trial(self, proposals: list[Sequence[int]]) -> list[int]:
        """None, but now and then one draft: what a further token costs may have been measured at a bad moment."""
        self._until_trial -= 1
        counts = [0] * len(proposals)
        if self._until_trial <= 0:
            self._trial_interval = min(2 * self._trial_interval, _RAREST_TRIAL)
            self._until_trial = self._trial_interval
            counts[max(range(len(proposals)), key=lambda row: len(proposals[row]))] = 1
        return counts
