"""Which requests are replayed when engines fail again and again: what makes them fail is not, what ran beside it is."""

from __future__ import annotations

import pytest

from pagoda.engine.client.replay import Replay
from pagoda.engine.messages import EngineOutput
from pagoda.errors import EngineDeadError
from tests.support.requests import make_request

FAILED = EngineDeadError("it failed", may_have_run=True)
KILLED = EngineDeadError("it was killed", may_have_run=True, was_killed=True)
WAITED = EngineDeadError("it failed", may_have_run=False)


def replays(replay: Replay, failures: list[tuple[EngineDeadError, bool]]) -> list[bool]:
    """Whether it is replayed after each failure; before it, the request had output in that engine or not."""
    found = []
    for failure, has_output in failures:
        if has_output:
            replay.deliver(EngineOutput(request_id="a", new_token_ids=[1]))
        found.append(replay.engine_failed(failure))
    return found


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        # It never gets as far as a token: the second engine that it is in is the last one.
        ([(FAILED, False), (FAILED, False)], [True, False]),
        # It ran beside what made two engines fail.
        ([(FAILED, True), (FAILED, True), (FAILED, True)], [True, True, False]),
        ([(FAILED, True), (FAILED, False)], [True, False]),
        ([(KILLED, False)] * 9, [True] * 9),
        ([(WAITED, False)] * 9, [True] * 9),
    ],
)
def test_who_is_replayed(failures: list[tuple[EngineDeadError, bool]], expected: list[bool]) -> None:
    assert replays(Replay(make_request("a", 3).spec, 1), failures) == expected


def test_none_is_where_none_may_be() -> None:
    assert replays(Replay(make_request("a", 3).spec, 0), [(KILLED, False)]) == [False]
