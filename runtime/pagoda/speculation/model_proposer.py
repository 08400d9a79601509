"""Drafts of a draft model on the ranks: how many to ask for, and how many of them to verify.

The ranks make drafts with the result of a step, for the next one. So two numbers are chosen: the drafts to verify, as for any
proposer, and before that the rows to make drafts for and how many, by the rates of acceptance, the time of the draft model's
passes, and the cost of verifying. Prices are measured when the engine starts, and in every step; rates begin with what the
requests before have shown.

Where none are worth it the draft model rests. Now and then it is tried on one row with one draft, further and further
apart; whatever is tried or believed, `LossBudget` bounds what it may lose.

    steps       ░░░░░░░░░░░░░░░░░░░░░░░░░▒▒▒▒████░░░░░░░░░░░░░░░
                nobody is asked          │   on trial
                                         the ranks keep what a head reads, from here on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pagoda.scheduling.lookahead import MeasuredStep
from pagoda.scheduling.request import Request
from pagoda.scheduling.step_cost import StepCost
from pagoda.speculation.acceptance import AcceptanceRates
from pagoda.speculation.draft_count import LEAST_GAIN, choose_counts
from pagoda.speculation.loss_budget import LossBudget
from pagoda.speculation.plain_steps import PlainSteps

# How much a new observation counts: for a request, and for what the next ones begin with.
_REQUEST_SHARE, _COMMON_SHARE = 0.06, 0.01
_TRIAL_SHARE = 0.1
# So many observations weigh as much as the rates that a request begins with, and the first guess.
_REQUEST_BELIEF, _COMMON_BELIEF = 8, 3
# Steps without the draft model before it is tried again, and for how many steps then.
_FIRST_REST, _LONGEST_REST, _TRIAL_STEPS = 32, 4096, 4
# Steps after which it is asked again whether drafts pay: at first, and where the load stays the same.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 16, 256
# Steps that a head reads before it drafts, if it did not read those before.
_READ_BEFORE = 24


@dataclass(slots=True)
class _State:
    """What is known of a request: its rates, the drafts that follow its first `num_known` tokens, and how many of its tokens
    the draft model has seen."""

    limit: int
    rates: AcceptanceRates
    drafts: list[int] = field(default_factory=list)
    num_known: int = 0
    num_followed: int = 0
    is_followed: bool = False  # by the last step
    num_readings: int = 0  # `ModelProposer._num_readings` when it was last followed


class _Row(NamedTuple):
    """A row that may have drafts: the probabilities that they and all before them are right, and what the draft model has
    missed of its request."""

    place: int
    request: Request
    probabilities: list[float]
    num_missing: int


class ModelProposer:
    """A `scheduling.lookahead.Proposer` of what a draft model made."""

    def __init__(self, num_speculative_tokens: int, *, reads_states: bool = False) -> None:
        """`reads_states`: a head, which reads hidden states of the model, and so begins where these are kept."""
        self.resting = 0
        self.reads_along = True
        self._reads_states = reads_states
        self._num_readings = 0  # how often it has begun to read along
        self._pause = _SHORTEST_PAUSE
        self._asked_after = 1  # steps
        self._most = num_speculative_tokens
        self._cost = StepCost()
        self._pass_cost = StepCost(self._cost.pace)
        self._common = AcceptanceRates.unknown(num_speculative_tokens, _COMMON_SHARE, _COMMON_BELIEF)
        self._budget = LossBudget(self._cost, self._pass_cost)
        self._rest, self._next_rest = _FIRST_REST, 2 * _FIRST_REST
        self._trial_steps = 0  # that are left of a trial
        self._on_trial: Request | None = None
        self._plain_steps = PlainSteps(self._cost)
        self._num_outputs = 0  # when it was last asked
        self._drafted: set[Request] = set()  # those whose drafts are not settled

    def add(self, request: Request) -> None:
        limit = request.spec.num_speculative_tokens
        limit = self._most if limit is None else min(limit, self._most)
        if limit:
            request.speculates = True
            rates = self._common.copy(_REQUEST_SHARE, _REQUEST_BELIEF)
            request.draft_state = _State(limit, rates, num_readings=self._num_readings)
            if self.resting > _SHORTEST_PAUSE:
                self._asked_after -= self.resting - _SHORTEST_PAUSE
                self.resting = _SHORTEST_PAUSE

    def remove(self, request: Request) -> None:
        request.draft_state = None
        self._drafted.discard(request)
        if self._on_trial is request:
            self._on_trial = None

    def receive(self, request: Request, draft_token_ids: list[int]) -> None:
        state = request.draft_state
        if isinstance(state, _State):
            state.drafts, state.num_known = draft_token_ids, request.num_tokens
            self._drafted.add(request)

    def calibrate(self, step: MeasuredStep) -> None:
        if step.only_decodes:
            self._cost.observe(step.num_tokens, step.seconds)
        for num_tokens, seconds in step.draft_passes:
            self._pass_cost.observe(num_tokens, seconds)

    def observe(self, step: MeasuredStep) -> None:
        self._budget.settle(step)
        self.calibrate(step)

    def propose(
        self, requests: Sequence[Request], limits: Sequence[int], num_outputs: int, num_tokens: int
    ) -> Sequence[Sequence[int]]:
        if not self._drafted or not self._cost.is_measured(num_outputs):
            return ()
        proposals = [self._drafts_of(request)[: max(0, limit)] for request, limit in zip(requests, limits, strict=True)]
        probabilities = [
            request.draft_state.rates.all_right_up_to(len(drafts)) if isinstance(request.draft_state, _State) else []
            for request, drafts in zip(requests, proposals, strict=True)
        ]
        # They are there: what making them has cost counts no more.
        counts = choose_counts(probabilities, num_outputs, num_tokens, self._cost)
        return [
            drafts if request is self._on_trial else drafts[:count]
            for request, drafts, count in zip(requests, proposals, counts, strict=True)
        ]

    def wanted(self, requests: Sequence[Request], num_outputs: int) -> Sequence[int | None]:
        for request in list(self._drafted):
            self._learn(request)
        self._rest -= self._asked_after
        self._asked_after = 1
        rows = [row for row in map(self._row, range(len(requests)), requests) if row is not None]
        if not rows or (num_outputs and not self._cost.is_measured(num_outputs)):
            return ()
        counts = self._wanted(rows, num_outputs, len(requests))
        if not counts and not self.resting:
            self._pause_asking(num_outputs)
        for row in rows:
            state = row.request.draft_state
            assert isinstance(state, _State)
            state.is_followed = row.place in counts
            if state.is_followed:
                state.num_followed, state.num_readings = row.request.num_tokens, self._num_readings
        return [counts.get(place) for place in range(len(requests))] if counts else ()

    def _wanted(self, rows: list[_Row], num_outputs: int, num_rows: int) -> dict[int, int]:
        """By place, how many drafts to make of which row. A head that has not read the steps before is to read some first."""
        # In a step of prompts alone the draft model reads along where it will be wanted.
        chosen, count = self._worthwhile(rows, num_outputs or num_rows)
        if not self._budget.is_open:
            chosen = []
        if not self.reads_along:
            if chosen or self._rest <= _READ_BEFORE:
                self.reads_along = True
                self._num_readings += 1
                self._rest_for(_READ_BEFORE)
            return {}
        if chosen:
            self._trial_steps, self._on_trial = 0, None
            self._rest, self._next_rest = _FIRST_REST, 2 * _FIRST_REST
            if not num_outputs or self._plain_steps.is_due(num_outputs):
                count = 0
            return {row.place: min(count, _state(row.request).limit) for row in chosen}
        on_trial = self._next_trial(rows, num_outputs) if num_outputs else None
        return {} if on_trial is None else {on_trial.place: 1}

    def _pause_asking(self, num_outputs: int) -> None:
        """Rest, the longer the longer nothing has changed, but not past the next trial."""
        if num_outputs != self._num_outputs:
            self._num_outputs, self._pause = num_outputs, _SHORTEST_PAUSE
        if self._reads_states and self._rest > 2 * _READ_BEFORE:
            self.reads_along = False
        until_trial = self._rest if self.reads_along else self._rest - _READ_BEFORE
        self._rest_for(max(0, min(self._pause, until_trial - 1)))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _rest_for(self, num_steps: int) -> None:
        self.resting = num_steps
        self._asked_after = 1 + num_steps

    def _worthwhile(self, rows: list[_Row], num_outputs: int) -> tuple[list[_Row], int]:
        """The rows, and the number of drafts of each, with which tokens come fastest; none where that is hardly faster than
        without.

        Rows that the draft model does not know yet wait until it may take the time to read what it has missed.
        """
        known = [row for row in rows if not row.num_missing]
        catching_up = 0.0
        for row in sorted((row for row in rows if row.num_missing), key=lambda row: row.num_missing):
            catching_up += self._catch_up(row)
            if not self._budget.allows(catching_up):
                break
            known.append(row)
        known.sort(key=lambda row: sum(row.probabilities), reverse=True)
        best_rate, best = LEAST_GAIN * num_outputs / self._cost.seconds(num_outputs), (0, 0)
        for num_rows in _prefixes(len(known)):
            pass_seconds = self._pass_cost.seconds(num_rows)
            expected = float(num_outputs)
            for count in range(1, self._most + 1):
                expected += sum(row.probabilities[count - 1] for row in known[:num_rows])
                seconds = self._cost.seconds(num_outputs + count * num_rows) + count * pass_seconds
                if expected / seconds > best_rate:
                    best_rate, best = expected / seconds, (num_rows, count)
        return known[: best[0]], best[1]

    def _next_trial(self, rows: list[_Row], num_outputs: int) -> _Row | None:
        """The row to try the draft model on in this step, if it is time for that, and it may be lost."""
        if self._trial_steps == 0 and self._rest > 0:
            return None
        row = next((row for row in rows if row.request is self._on_trial), None)
        row = row or min(rows, key=lambda row: row.num_missing)
        verifying = self._cost.seconds(num_outputs + 1) - self._cost.seconds(num_outputs)
        if not self._budget.allows(self._pass_cost.seconds(1) + self._catch_up(row) + max(0.0, verifying)):
            self._rest = self._next_rest  # until so much is saved
            return None
        if self._trial_steps == 0:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
            # Where drafts would not pay if they were all right, their price alone is worth knowing.
            right = row._replace(probabilities=[1.0] * self._most, num_missing=0)
            self._trial_steps = _TRIAL_STEPS if self._worthwhile([right], num_outputs)[1] else 1
        self._trial_steps -= 1
        self._on_trial = row.request
        return row

    def _row(self, place: int, request: Request) -> _Row | None:
        state = request.draft_state
        if not isinstance(state, _State):
            return None
        num_missing = 0
        if not state.is_followed:
            num_missing = request.num_tokens - max(state.num_followed, request.num_cached_tokens)
        if self._reads_states and state.num_readings != self._num_readings:  # what came before is not read at all
            num_missing = min(num_missing, _READ_BEFORE)
        probabilities = [*state.rates.all_right_up_to(state.limit), *[0.0] * (self._most - state.limit)]
        return _Row(place, request, probabilities, num_missing)

    def _catch_up(self, row: _Row) -> float:
        """Seconds that a pass takes longer for what it has missed of a row."""
        return self._pass_cost.seconds(1 + row.num_missing) - self._pass_cost.seconds(1)

    def _learn(self, request: Request) -> None:
        """Take into the rates what has become of the request's drafts, verified or not."""
        state = request.draft_state
        if not isinstance(state, _State) or request.num_tokens <= state.num_known:
            return
        self._drafted.discard(request)
        came = request.token_ids[state.num_known : state.num_known + len(state.drafts)]
        num_right = 0
        for draft, token in zip(state.drafts, came, strict=False):
            if draft != token:
                break
            num_right += 1
        least_share = _TRIAL_SHARE if request is self._on_trial else 0.0
        for rates in (state.rates, self._common):
            rates.observe(len(came), num_right, least_share)

    @staticmethod
    def _drafts_of(request: Request) -> list[int]:
        """The drafts that follow the request's known tokens."""
        state = request.draft_state
        if not isinstance(state, _State) or state.num_known != request.num_tokens:
            return []
        return state.drafts


def _state(request: Request) -> _State:
    assert isinstance(request.draft_state, _State)
    return request.draft_state


def _prefixes(size: int) -> list[int]:
    """Powers of two up to `size`, and `size`."""
    return [*(1 << power for power in range(size.bit_length()) if 1 << power < size), size] if size else []
