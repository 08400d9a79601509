"""The state machine: which moves there are, what holds it back, and who hears of it."""

from __future__ import annotations

import itertools
import logging

import pytest

from pagoda.engine.health import ALLOWED, EngineHealth, EngineState


def health_in(state: EngineState) -> EngineHealth:
    health = EngineHealth()
    way = {
        EngineState.STARTING: [],
        EngineState.READY: [EngineState.READY],
        EngineState.DEGRADED: [EngineState.READY, EngineState.DEGRADED],
        EngineState.DRAINING: [EngineState.DRAINING],
        EngineState.DEAD: [EngineState.DEAD],
        EngineState.SLEEPING: [EngineState.READY, EngineState.SLEEPING],
        EngineState.UNLOADED: [],
    }[state]
    for step in way:
        health.transition(step, "on the way")
    if state is EngineState.UNLOADED:
        health.unload("on the way")
    return health


@pytest.mark.parametrize("origin", [EngineState.UNLOADED, EngineState.DEAD])
def test_what_is_loaded_again_is_loading_and_no_failure(origin: EngineState, caplog: pytest.LogCaptureFixture) -> None:
    health = health_in(origin)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        health.load("loading")
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert (health.state, health.is_loading) == (EngineState.STARTING, True)
    health.transition(EngineState.READY, "loaded")
    assert not health.is_loading


@pytest.mark.parametrize("origin", EngineState)
def test_an_engine_may_be_unloaded_whatever_it_does(origin: EngineState) -> None:
    health = health_in(origin)
    health.hold("tokenizer")
    health.unload("a test")
    assert (health.state, health.phase) == (EngineState.UNLOADED, "unloaded")


@pytest.mark.parametrize(("origin", "target"), itertools.permutations(EngineState, 2))
def test_only_the_moves_of_the_picture_are_made_and_each_is_counted(origin: EngineState, target: EngineState) -> None:
    health = health_in(origin)
    if target not in ALLOWED[origin]:
        with pytest.raises(ValueError, match=f"from {origin} to {target}"):
            health.transition(target, "a test")
        assert health.state is origin
        return
    health.transition(target, "a test")
    assert (health.state, health.cause) == (target, "a test")
    assert health.transitions[origin, target] == 1


def test_staying_is_no_transition() -> None:
    health = health_in(EngineState.READY)
    health.transition(EngineState.READY, "again")
    assert health.transitions.total() == 1
    assert health.cause == "on the way"


def test_what_holds_it_keeps_it_from_becoming_ready(caplog: pytest.LogCaptureFixture) -> None:
    health = EngineHealth()
    health.hold("tokenizer")
    health.transition(EngineState.READY, "the core has started")
    assert (health.state, health.phase) == (EngineState.STARTING, "tokenizer")
    with caplog.at_level(logging.INFO):
        health.release("tokenizer")
    assert (health.state, health.cause) == (EngineState.READY, "the core has started")
    assert "engine starting -> ready: the core has started" in caplog.text
    health.release("tokenizer")


def test_an_engine_that_is_lost_while_it_is_held_is_not_released_into_readiness() -> None:
    health = EngineHealth()
    health.hold("tokenizer")
    health.transition(EngineState.READY, "the core has started")
    health.transition(EngineState.STARTING, "the core was lost")
    health.release("tokenizer")
    assert health.state is EngineState.STARTING


def test_a_drain_while_it_is_held_is_not_undone_by_the_release() -> None:
    health = EngineHealth()
    health.hold("tokenizer")
    health.transition(EngineState.READY, "the core has started")
    health.transition(EngineState.DRAINING, "told to stop")
    health.release("tokenizer")
    assert health.state is EngineState.DRAINING


def test_a_loss_is_logged_as_an_error_and_an_end_that_was_asked_for_is_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        health_in(EngineState.READY).transition(EngineState.STARTING, "killed")
        health_in(EngineState.READY).transition(EngineState.DEAD, "shut down", is_expected=True)
    levels = {record.getMessage(): record.levelno for record in caplog.records}
    assert levels["engine ready -> starting: killed"] == logging.ERROR
    assert levels["engine ready -> dead: shut down"] == logging.INFO


def test_listeners_hear_of_states_and_stages_until_they_unsubscribe() -> None:
    health = EngineHealth()
    heard: list[tuple[str, str]] = []
    end = health.subscribe(lambda: heard.append((health.state, health.phase)))
    health.enter_phase("weights")
    health.transition(EngineState.READY, "started")
    end()
    health.transition(EngineState.DEAD, "lost")
    assert heard == [("starting", "weights"), ("ready", "ready")]
