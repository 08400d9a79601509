"""How many drafts are verified: by what steps cost and by how often drafts are right."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.lookahead import MeasuredStep
from pagoda.scheduling.plan import StepPlan, StepResult
from pagoda.scheduling.request import Request
from pagoda.scheduling.step_cost import StepCost
from pagoda.speculation.acceptance import AcceptanceRates
from pagoda.speculation.draft_count import choose_counts, may_pay
from pagoda.speculation.proposer import HostProposer


def measured(seconds: dict[int, float]) -> StepCost:
    cost = StepCost()
    for _ in range(60):
        for num_tokens, value in seconds.items():
            cost.observe(num_tokens, value)
    return cost


FLAT = {1: 1.0, 8: 1.05, 64: 1.4}
STEEP = {1: 1.0, 2: 2.0, 8: 8.0, 64: 64.0}


def test_cost_is_what_was_measured_and_lies_between_its_neighbours() -> None:
    cost = measured(FLAT)
    for num_tokens, value in FLAT.items():
        assert cost.of(num_tokens) / cost.of(1) == pytest.approx(value, rel=0.05)
    assert cost.of(1) <= cost.of(4) <= cost.of(8) <= cost.of(30) <= cost.of(64) <= cost.of(200)


def test_cost_ratios_survive_a_change_that_slows_all_steps() -> None:
    cost = measured(FLAT)
    for _ in range(300):
        cost.observe(8, 3 * FLAT[8])  # contexts have grown; steps of one token were not seen since
    assert cost.of(8) / cost.of(1) == pytest.approx(1.05, rel=0.15)
    assert cost.seconds(1) == pytest.approx(3.0, rel=0.15)


def test_one_outlier_does_not_count_for_much() -> None:
    cost = measured(FLAT)
    cost.observe(8, 100.0)
    assert cost.of(8) / cost.of(1) < 1.3


def test_where_a_step_costs_the_same_all_likely_drafts_are_taken_and_where_it_does_not_none() -> None:
    likely = [[0.9**place for place in range(1, 9)]]
    assert choose_counts(likely, 1, 1, measured(FLAT))[0] >= 7
    assert choose_counts(likely, 1, 1, measured(STEEP)) == [0]
    assert not may_pay(1, 1, 8, measured(STEEP))
    assert may_pay(1, 1, 8, measured(FLAT))


def test_drafts_go_to_the_rows_in_which_they_are_likely() -> None:
    counts = choose_counts([[0.05] * 4, [0.95, 0.9, 0.85, 0.8]], 2, 2, measured({1: 1.0, 16: 1.6}))
    assert counts[1] >= 3
    assert counts[0] == 0


@given(st.lists(st.lists(st.floats(0, 1), max_size=6), min_size=1, max_size=5), st.sampled_from([FLAT, STEEP]))
def test_a_choice_never_promises_less_than_no_drafts(rows: list[list[float]], seconds: dict[int, float]) -> None:
    probabilities = [sorted(row, reverse=True) for row in rows]
    cost, num_rows = measured(seconds), len(rows)
    counts = choose_counts(probabilities, num_rows, num_rows, cost)
    expected = sum(sum(values[:count]) for values, count in zip(probabilities, counts, strict=True))
    with_drafts = (num_rows + expected) / cost.of(num_rows + sum(counts))
    assert with_drafts >= num_rows / cost.of(num_rows)
    assert all(count <= len(values) for values, count in zip(probabilities, counts, strict=True))


def test_rates_are_those_of_each_place_given_that_those_before_it_were_right() -> None:
    rates = AcceptanceRates.unknown(4, 0.1)
    for index in range(300):
        rates.observe(4, 2 if index % 2 else 1)
    assert rates.rates[0] == pytest.approx(1.0, abs=0.01)
    assert rates.rates[1] == pytest.approx(0.5, abs=0.1)
    assert rates.rates[2] == pytest.approx(0.0, abs=0.01)


class Fixed:
    """Proposes one token again and again."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.num_calls = 0

    def propose(self, limit: int) -> Sequence[int]:
        self.num_calls += 1
        return [self.token] * limit


def step_of(num_drafts: int, num_accepted: int, seconds: float) -> MeasuredStep:
    return MeasuredStep(
        num_outputs=1,
        num_tokens=1 + num_drafts,
        num_drafts=num_drafts,
        num_made=1 + num_accepted,
        only_decodes=True,
        seconds=seconds,
    )


def play(drafter: Fixed, output_token: int, cost: dict[int, float], steps: int = 200, **fields) -> list[int]:
    """How many drafts each of `steps` steps verified, of a request whose output is `output_token` throughout."""
    proposer = HostProposer(8, lambda request: drafter)
    spec = EngineRequest(request_id="r", prompt_token_ids=[1], params=SamplingParams(), max_tokens=10**6, **fields)
    request = Request(spec)
    proposer.add(request)
    counts = []
    table = measured(cost)
    for _ in range(steps):
        ((*drafts,),) = proposer.propose([request], [8], 1, 1)
        counts.append(len(drafts))
        accepted = len(drafts) if drafter.token == output_token else 0
        request.token_ids += [output_token] * (accepted + 1)
        proposer.observe(step_of(len(drafts), accepted, table.of(1 + len(drafts))))
    return counts


def test_right_drafts_become_many_and_wrong_ones_none() -> None:
    assert play(Fixed(5), 5, FLAT)[-1] == 8
    wrong = play(Fixed(5), 6, FLAT)
    assert sum(wrong[50:]) <= 5
    assert sum(play(Fixed(5), 5, STEEP)[50:]) <= 20


def test_request_may_have_fewer_drafts_or_none() -> None:
    assert max(play(Fixed(5), 5, FLAT, num_speculative_tokens=3)) == 3
    drafter = Fixed(5)
    assert max(play(drafter, 5, FLAT, num_speculative_tokens=0)) == 0
    assert drafter.num_calls == 0
    assert max(play(Fixed(5), 5, FLAT, num_speculative_tokens=50)) == 8


def test_rates_are_learned_without_verifying_anything() -> None:
    """In a steep world nothing is verified; when it becomes flat, what was proposed meanwhile has shown itself."""
    proposer = HostProposer(8, lambda request: Fixed(5))
    request = Request(EngineRequest(request_id="r", prompt_token_ids=[1], params=SamplingParams(), max_tokens=10**6))
    proposer.add(request)
    for _ in range(100):
        ((*drafts,),) = proposer.propose([request], [8], 1, 1)
        request.token_ids += [6] * (1 + 0 * len(drafts))
        proposer.observe(step_of(len(drafts), 0, 1.0 + len(drafts)))
    state = request.draft_state
    assert state.sources[0].rates.rates[0] < 0.05  # type: ignore[attr-defined]


def test_several_model_steps_on_one_plan_are_measured_as_one_of_them() -> None:
    """Else nothing would be known of what rows without drafts take, with `num_scheduler_steps`."""
    plan = StepPlan(0, num_scheduled_tokens=[1, 1], samples=[True, True], num_steps=[4, 4])
    result = StepResult(0, [[5] * 4, [5] * 4])
    step = MeasuredStep.of(plan, result, 2.0)
    assert (step.num_outputs, step.num_tokens, step.only_decodes, step.seconds) == (2, 2, True, 0.5)
    plan.num_steps = [4, 1]
    assert not MeasuredStep.of(plan, result, 2.0).only_decodes
