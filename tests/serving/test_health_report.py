"""What the doors say of the server's health: one state machine, whoever asks."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from pagoda.engine.health import EngineState
from pagoda.engine.heartbeat import EngineHeartbeat
from pagoda.engine.messages import EngineStats
from pagoda.parallel.rank_health import RankHealth
from pagoda.serving.health import ModelHealth
from tests.support.fake_engine import FakeEngineClient
from tests.support.rest_harness import RestHarness


class WatchedEngine(FakeEngineClient):
    """A fake engine with a sign of life."""

    last_sign: EngineHeartbeat | None = None
    replicas: tuple[WatchedEngine, ...] = ()

    @property
    def heartbeat(self) -> EngineHeartbeat | None:
        return self.last_sign


@pytest.fixture
def harness() -> Iterator[RestHarness]:
    with RestHarness(is_ready=False) as running:
        yield running


def test_the_report_has_state_load_and_the_age_of_the_last_sign_of_life() -> None:
    engine = WatchedEngine()
    health = ModelHealth(engine)
    before = health.snapshot()
    assert (before["state"], before["step"], before["seconds_since_progress"]) == ("starting", None, None)
    engine.health.transition(EngineState.READY, "started")
    health.text_is_ready()
    engine.stats = EngineStats(num_running=2, num_waiting=3, num_blocks=10, num_blocks_in_use=4)
    engine.last_sign = EngineHeartbeat(17, time.monotonic() - 2.0, 64, is_busy=True)
    report = health.snapshot()
    assert (before["started"], report["started"]) == (False, True)
    assert report["state"] == "ready"
    assert report["cause"] == "started"
    assert report["since"] == pytest.approx(time.time(), abs=60)
    assert (report["running"], report["waiting"], report["kv_cache_usage"], report["step"]) == (2, 3, 0.4, 17)
    assert 2 <= report["seconds_since_progress"] < 60


def test_the_report_lists_the_ranks_of_a_model_with_several() -> None:
    engine = WatchedEngine()
    health = ModelHealth(engine)
    assert health.snapshot()["ranks"] == []
    engine.ranks = [RankHealth(rank=1, host="b", pid=42, last_heartbeat=time.monotonic() - 2, num_steps=7, is_up=False)]
    (rank,) = health.snapshot()["ranks"]
    assert 2 <= rank.pop("seconds_since_heartbeat") < 60
    assert rank == {"rank": 1, "host": "b", "pid": 42, "up": False, "step": 7}


def test_the_report_lists_the_replicas_of_an_engine_with_several() -> None:
    engine, replica = WatchedEngine(), WatchedEngine()
    assert ModelHealth(engine).snapshot()["replicas"] == []
    engine.replicas = (replica,)
    replica.health.transition(EngineState.READY, "started")
    replica.stats = EngineStats(num_running=2, num_waiting=1)
    (shown,) = ModelHealth(engine).snapshot()["replicas"]
    assert shown["since"] == pytest.approx(time.time(), abs=60)
    assert (shown["replica"], shown["state"], shown["cause"]) == (0, "ready", "started")
    assert (shown["running"], shown["waiting"], shown["kv_cache_usage"]) == (2, 1, 0.0)


def test_an_engine_without_tokenizers_is_not_ready(harness: RestHarness) -> None:
    harness.run(harness.engine.start)
    report = harness.client.get("/health")
    assert (report.status_code, report.json()["state"], report.json()["stage"]) == (503, "starting", "tokenizer")
    metrics = harness.client.get("/metrics").text
    assert 'pagoda_engine_state{model_name="demo",state="starting"} 1.0' in metrics
    harness.call(harness.context.models.default.health.text_is_ready)
    assert harness.client.get("/v2/health/ready").status_code == 200


def test_doors_and_metrics_follow_every_move_of_the_engine(harness: RestHarness) -> None:
    harness.run(harness.load)
    ways = [
        (EngineState.DEGRADED, 200, 200),
        (EngineState.READY, 200, 200),
        (EngineState.STARTING, 503, 200),  # the core was lost, and is started anew
        (EngineState.READY, 200, 200),
        (EngineState.DRAINING, 503, 200),
        (EngineState.DEAD, 503, 503),
    ]
    for state, ready, live in ways:
        harness.call(harness.engine.health.transition, state, f"a test wants {state}")
        report = harness.client.get("/health")
        assert (report.status_code, report.json()["state"]) == (ready, state)
        assert report.json()["cause"] == f"a test wants {state}"
        assert harness.client.get("/v2/health/ready").status_code == ready
        assert harness.client.get("/v2/models/demo/ready").status_code == ready
        assert harness.client.get("/v2/health/live").status_code == live
        metrics = harness.client.get("/metrics").text
        assert f'pagoda_engine_state{{model_name="demo",state="{state}"}} 1.0' in metrics
    assert harness.client.get("/v2/health/live").json()["error"] == "dead: a test wants dead"
    moves = {line for line in metrics.splitlines() if line.startswith("pagoda_engine_state_transitions_total")}
    counted = {line for line in moves if line.endswith(" 1.0")}
    assert len(counted) == len(ways) - 1  # the move from starting to ready was made twice
    assert 'pagoda_engine_state_transitions_total{from="starting",model_name="demo",to="ready"} 2.0' in moves
