"""What is left of a step for those who wait."""

from __future__ import annotations

import pytest

from pagoda.scheduling.request import Flow
from pagoda.scheduling.step_composition import Allowance, StepComposition


@pytest.mark.parametrize("has_company", [False, True])
@pytest.mark.parametrize("room", [-2, -1, 0])
def test_nobody_is_admitted_where_running_prompts_took_more_than_the_room(room: int, has_company: bool) -> None:
    flow = Flow("a", "")
    for allowances in (None, {flow: Allowance(0)}, {flow: Allowance(3)}):
        composition = StepComposition([], [], 8, room, 8, has_company=has_company, allowances=allowances)
        assert composition.allowed(flow) == 0


def test_what_is_left_of_the_step_and_of_a_flow_is_what_it_may_have() -> None:
    flow = Flow("a", "")
    composition = StepComposition([], [], 8, 5, 8, allowances={flow: Allowance(2)})
    assert composition.allowed(flow) == 2
    assert composition.allowed(Flow("b", "")) == 0
    composition.use(flow, 2)
    assert (composition.room, composition.allowed(flow)) == (3, 0)
