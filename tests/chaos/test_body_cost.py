"""No body costs more than it may: many more of them, and larger ones, than in tests/serving/test_body_cost.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from tests.support import costly_bodies as bodies
from tests.support.checkpoints import shared_checkpoint
from tests.support.costly_bodies import Body, check_cost
from tests.support.measured_server import Cost, MeasuredServer
from tests.support.notes import Note

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

MAX_BYTES = 24 * 2**20


@pytest.fixture(scope="module")
def server() -> Iterator[MeasuredServer]:
    with MeasuredServer(model=shared_checkpoint(), default_max_tokens=2) as running:
        running.wait_until_ready()
        yield running


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_any_body(server: MeasuredServer, protocol: str, note: Note) -> None:
    strategy = bodies.rest_bodies(MAX_BYTES) if protocol == "rest" else bodies.grpc_bodies(MAX_BYTES)
    costs: list[tuple[Cost, Body]] = []

    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(body=strategy)
    def ask(body: Body) -> None:
        costs.append((check_cost(server, body), body))

    ask()
    stall = max(cost.stall for cost, _ in costs)
    ratio = max((cost.memory / body.size for cost, body in costs if body.size > 2**20), default=0.0)
    note(
        f"{len(costs)} bodies: the loop stood still for {stall * 1e3:.0f} ms at most; over 1 MiB, {ratio:.1f} times the body"
    )


def test_every_value_in_every_field(server: MeasuredServer) -> None:
    for route, fields in bodies.FIELDS.items():
        for field in fields:
            for kind in bodies.VALUES:
                check_cost(server, bodies.rest_body(route, field, bodies.value(kind, 4 * 2**20, '"x"')))
