"""Drafts made on the host from known tokens, and only as many as pay.

A request has a drafter (look-up in its own text, or in past outputs too) and rates of acceptance. They are learned from every
proposal, verified or not: what a drafter proposed is compared with what came. So a request for which drafts do not pay costs
nothing but the look-ups until they would; and where these cost too much of a step themselves, they pause.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from pagoda.scheduling.request import Request
from pagoda.speculation.acceptance import AcceptanceRates
from pagoda.speculation.draft_count import choose_counts, may_pay
from pagoda.speculation.step_cost import StepCost

# How much a new observation counts: for a request, and for what the next ones begin with.
_REQUEST_SHARE = 0.12
_COMMON_SHARE = 0.02
# The share of a step's time that may go into proposals of which none is used.
_IDLE_SHARE = 0.005
# Steps between two in which drafts are verified that do not seem to pay, to measure what they cost.
_FIRST_TRIAL, _RAREST_TRIAL = 32, 1024
# Steps with drafts between two without, to measure what those cost.
_PLAIN_INTERVAL = 100


class Drafter(Protocol):
    """Proposes tokens for one request."""

    def propose(self, limit: int) -> Sequence[int]:
        """Up to `limit` tokens that may follow the request's known tokens."""


class _State:
    """What is known of a request: its drafter, its rates, and a proposal that is not yet decided."""

    __slots__ = ("begin", "drafter", "limit", "pending", "rates")

    def __init__(self, drafter: Drafter, limit: int, rates: AcceptanceRates) -> None:
        self.drafter = drafter
        self.limit = limit
        self.rates = rates
        self.pending: Sequence[int] = ()
        self.begin = 0  # of `pending`, in the request's tokens

    def settle(self, request: Request) -> tuple[int, int] | None:
        """The length of the pending proposal and how much of it came true, once that is known."""
        pending = self.pending
        if not pending:
            return None
        came = request.token_ids[self.begin : self.begin + len(pending)]
        num_right = 0
        for proposed, token in zip(pending, came, strict=False):
            if proposed != token:
                break
            num_right += 1
        else:
            if len(came) < len(pending):
                return None  # right as far as it is known
        self.pending = ()
        return len(pending), num_right


class HostProposer:
    """A `scheduling.lookahead.Proposer` of drafters that need no model."""

    def __init__(
        self,
        num_speculative_tokens: int,
        make_drafter: Callable[[Request], Drafter],
        on_end: Callable[[Request], None] = lambda request: None,
    ) -> None:
        self._most = num_speculative_tokens
        self._make_drafter = make_drafter
        self._on_end = on_end
        self._cost = StepCost()
        self._common = AcceptanceRates.unknown(num_speculative_tokens, _COMMON_SHARE)
        self._pause = 0
        self._until_trial = self._trial_interval = _FIRST_TRIAL
        self._until_plain = _PLAIN_INTERVAL

    def add(self, request: Request) -> None:
        limit = request.spec.num_speculative_tokens
        limit = self._most if limit is None else min(limit, self._most)
        if limit:
            request.speculates = True
            rates = AcceptanceRates(self._common.rates, _REQUEST_SHARE)
            request.draft_state = _State(self._make_drafter(request), limit, rates)

    def remove(self, request: Request) -> None:
        request.draft_state = None
        self._on_end(request)

    def wanted(self, requests: Sequence[Request], num_outputs: int) -> Sequence[int | None]:
        del num_outputs
        return [None] * len(requests)

    def receive(self, request: Request, draft_token_ids: list[int]) -> None:
        raise NotImplementedError("no draft model was asked for drafts")

    def observe(self, num_tokens: int, seconds: float) -> None:
        self._cost.observe(num_tokens, seconds)

    def observe_drafting(self, num_drafts: int, seconds: float) -> None:
        pass  # none was made on a rank

    def propose(
        self, requests: Sequence[Request], limits: Sequence[int], num_outputs: int, num_tokens: int
    ) -> list[Sequence[int]]:
        if self._pause:
            self._pause -= 1
            return [()] * len(requests)
        started = time.perf_counter()
        proposals = [self._proposal(request, limit) for request, limit in zip(requests, limits, strict=True)]
        counts = self._counts(requests, proposals, num_outputs, num_tokens)
        if not any(counts):
            # Look again when what was spent in vain is made up for.
            step_seconds = self._cost.seconds(num_tokens)
            spent = time.perf_counter() - started
            self._pause = int(spent / (_IDLE_SHARE * step_seconds)) if step_seconds else 0
        return [proposal[:count] for proposal, count in zip(proposals, counts, strict=True)]

    def _proposal(self, request: Request, limit: int) -> Sequence[int]:
        state = request.draft_state
        if not isinstance(state, _State):
            return ()
        settled = state.settle(request)
        if settled is not None:
            state.rates.observe(*settled)
            self._common.observe(*settled)
        limit = min(limit, state.limit)
        proposal = state.drafter.propose(limit) if limit > 0 else ()
        if not state.pending:
            state.pending, state.begin = proposal, request.num_tokens
        return proposal

    def _counts(
        self, requests: Sequence[Request], proposals: list[Sequence[int]], num_outputs: int, num_tokens: int
    ) -> list[int]:
        """How many drafts of each proposal to verify."""
        if not any(proposals) or self._is_plain(num_outputs):
            return [0] * len(proposals)
        if not may_pay(num_outputs, num_tokens, sum(map(len, proposals)), self._cost):
            return self._trial(proposals)
        probabilities = [
            request.draft_state.rates.all_right_up_to(len(proposal)) if isinstance(request.draft_state, _State) else []
            for request, proposal in zip(requests, proposals, strict=True)
        ]
        counts = choose_counts(probabilities, num_outputs, num_tokens, self._cost)
        if any(counts):
            self._until_trial = self._trial_interval = _FIRST_TRIAL
        return counts if any(counts) else self._trial(proposals)

    def _is_plain(self, num_outputs: int) -> bool:
        """Whether this step must do without drafts, since it is not known, or not lately, what that costs."""
        self._until_plain -= 1
        if self._until_plain > 0 and self._cost.is_measured(num_outputs):
            return False
        self._until_plain = _PLAIN_INTERVAL
        return True

    def _trial(self, proposals: list[Sequence[int]]) -> list[int]:
        """None, but now and then one draft: what a further token costs may have been measured at a bad moment."""
        self._until_trial -= 1
        counts = [0] * len(proposals)
        if self._until_trial <= 0:
            self._trial_interval = min(2 * self._trial_interval, _RAREST_TRIAL)
            self._until_trial = self._trial_interval
            counts[max(range(len(proposals)), key=lambda row: len(proposals[row]))] = 1
        return counts
