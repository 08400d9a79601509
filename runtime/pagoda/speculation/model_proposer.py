"""Drafts of a draft model on the ranks: how many to ask for, and how many of them to verify.

The ranks make drafts with the result of a step, for the next one. So two numbers are chosen: the drafts to verify, as for any
proposer, and the drafts to make, by the rates of acceptance, the time of a draft pass, and the cost of verifying. Where none
are worth it the draft model rests, and is tried again later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pagoda.scheduling.request import Request
from pagoda.speculation.acceptance import AcceptanceRates
from pagoda.speculation.draft_count import choose_counts
from pagoda.speculation.step_cost import StepCost

_REQUEST_SHARE = 0.06
_COMMON_SHARE = 0.01
_PASS_SHARE = 0.1
_LEAST_GAIN = 1.03
# Steps without the draft model before it is tried again, and for how many steps then.
_FIRST_REST, _LONGEST_REST, _TRIAL_STEPS = 50, 2000, 6
_PLAIN_INTERVAL = 100


@dataclass(slots=True)
class _State:
    """What is known of a request: its rates, the drafts that follow its first `num_known` tokens, and what was verified."""

    limit: int
    rates: AcceptanceRates
    drafts: list[int] = field(default_factory=list)
    num_known: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class ModelProposer:
    """A `scheduling.lookahead.Proposer` of what a draft model made."""

    def __init__(self, num_speculative_tokens: int) -> None:
        self._most = num_speculative_tokens
        self._cost = StepCost()
        self._common = AcceptanceRates.unknown(num_speculative_tokens, _COMMON_SHARE)
        self._pass_seconds = 0.0
        self._rest = 0  # steps that are left of it
        self._next_rest = _FIRST_REST
        self._trial = _TRIAL_STEPS
        self._until_plain = _PLAIN_INTERVAL

    def add(self, request: Request) -> None:
        limit = request.spec.num_speculative_tokens
        limit = self._most if limit is None else min(limit, self._most)
        if limit:
            request.speculates = True
            request.draft_state = _State(limit, AcceptanceRates(self._common.rates, _REQUEST_SHARE))

    def remove(self, request: Request) -> None:
        request.draft_state = None

    def receive(self, request: Request, draft_token_ids: list[int]) -> None:
        state = request.draft_state
        if isinstance(state, _State):
            state.drafts, state.num_known = draft_token_ids, request.num_tokens

    def observe(self, num_tokens: int, seconds: float) -> None:
        self._cost.observe(num_tokens, seconds)

    def observe_drafting(self, num_drafts: int, seconds: float) -> None:
        if num_drafts:
            found = seconds / num_drafts
            known = self._pass_seconds
            self._pass_seconds = known + _PASS_SHARE * (min(found, 3 * known) - known) if known else found

    def propose(
        self, requests: Sequence[Request], limits: Sequence[int], num_outputs: int, num_tokens: int
    ) -> list[Sequence[int]]:
        proposals = [self._drafts_of(request)[: max(0, limit)] for request, limit in zip(requests, limits, strict=True)]
        if not any(proposals):
            return [()] * len(proposals)
        if not self._cost.is_measured(num_outputs):
            return [()] * len(proposals)
        rates = [self._rates_of(request) for request in requests]
        probabilities = [
            rate.all_right_up_to(len(drafts)) if rate is not None else []
            for rate, drafts in zip(rates, proposals, strict=True)
        ]
        # They are there: what making them has cost counts no more.
        counts = choose_counts(probabilities, num_outputs, num_tokens, self._cost)
        if self._trial and not any(counts):
            counts = [len(drafts) for drafts in proposals]
        return [drafts[:count] for drafts, count in zip(proposals, counts, strict=True)]

    def wanted(self, requests: Sequence[Request], num_outputs: int) -> Sequence[int | None]:
        if not requests:
            return []
        for request in requests:
            self._learn(request)
        if self._rest:
            self._rest -= 1
            if self._rest == 0:
                self._trial = _TRIAL_STEPS
            return [None] * len(requests)
        if not num_outputs:
            return [0] * len(requests)  # a prompt's chunk: the draft model reads along
        self._until_plain -= 1
        if self._until_plain <= 0 or not self._cost.is_measured(num_outputs):
            self._until_plain = _PLAIN_INTERVAL
            return [0] * len(requests)
        count = self._worthwhile(requests, num_outputs)
        if count:
            self._next_rest = _FIRST_REST
        elif self._trial:
            count = self._most
        else:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
            return [None] * len(requests)
        self._trial = max(0, self._trial - 1)
        return [
            min(count, request.draft_state.limit) if isinstance(request.draft_state, _State) else None
            for request in requests
        ]

    def _worthwhile(self, requests: Sequence[Request], num_outputs: int) -> int:
        """The number of drafts a row with which tokens come fastest; 0 where that is hardly faster than without."""
        chances = [rates.all_right_up_to(self._most) for rates in map(self._rates_of, requests) if rates is not None]
        plain = self._cost.seconds(num_outputs)
        best, best_rate = 0, _LEAST_GAIN * num_outputs / plain
        expected = float(num_outputs)
        for count in range(1, self._most + 1):
            expected += sum(values[count - 1] for values in chances)
            seconds = self._cost.seconds(num_outputs + count * len(chances)) + count * self._pass_seconds
            if expected / seconds > best_rate:
                best, best_rate = count, expected / seconds
        return best

    def _learn(self, request: Request) -> None:
        """Take into the rates what became of the drafts that were verified since the last time."""
        state = request.draft_state
        if not isinstance(state, _State) or request.num_draft_tokens == state.num_draft_tokens:
            return
        num_drafts = request.num_draft_tokens - state.num_draft_tokens
        num_right = request.num_accepted_tokens - state.num_accepted_tokens
        state.num_draft_tokens, state.num_accepted_tokens = request.num_draft_tokens, request.num_accepted_tokens
        state.rates.observe(num_drafts, num_right)
        self._common.observe(num_drafts, num_right)

    @staticmethod
    def _rates_of(request: Request) -> AcceptanceRates | None:
        state = request.draft_state
        return state.rates if isinstance(state, _State) else None

    @staticmethod
    def _drafts_of(request: Request) -> list[int]:
        """The drafts that follow the request's known tokens."""
        state = request.draft_state
        if not isinstance(state, _State) or state.num_known != request.num_tokens:
            return []
        return state.drafts
