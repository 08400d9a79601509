"""Sleep and wake-up: who may, what probes and metrics say meanwhile, and what a request finds."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pagoda.engine.health import EngineState
from tests.support.rest_harness import RestHarness
from tests.support.several_models import SeveralHarness
from tests.support.waiting import wait_until

BODY = {"prompt": "a b", "max_tokens": 2}


@pytest.fixture
def harness() -> Iterator[RestHarness]:
    with RestHarness() as running:
        yield running


def is_sleeping(harness: RestHarness) -> bool:
    return bool(harness.client.get("/is_sleeping").json()["is_sleeping"])


@pytest.mark.parametrize(("level", "state"), [(1, "weights_offloaded"), (2, "discard_all")])
def test_a_sleeping_server_says_so_and_a_request_wakes_it(harness: RestHarness, level: int, state: str) -> None:
    assert not is_sleeping(harness)
    assert harness.client.post("/sleep", params={"level": level}).status_code == 200
    assert is_sleeping(harness)
    assert harness.client.get("/health").json()["state"] == "sleeping"
    assert harness.client.get("/v2/health/ready").status_code == 200  # a request is answered
    metrics = harness.client.get("/metrics").text
    assert f'pagoda_engine_sleep_state{{model_name="demo",sleep_state="{state}"}} 1.0' in metrics
    assert f'vllm:engine_sleep_state{{model_name="demo",sleep_state="{state}"}} 1.0' in metrics
    assert harness.client.post("/v1/completions", json=BODY).status_code == 200
    assert not is_sleeping(harness)
    assert 'sleep_state="awake"} 1.0' in harness.client.get("/metrics").text
    assert harness.context.metrics.value("engine_restarts_total") == 0


def test_requests_that_come_while_it_wakes_wait_for_it(harness: RestHarness) -> None:
    harness.client.post("/sleep")
    harness.call(harness.engine.may_load.clear)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(harness.client.post, "/v1/completions", json=BODY) for _ in range(3)]
        wait_until(lambda: harness.engine.health.state is EngineState.STARTING)

        async def wake() -> None:
            harness.engine.may_load.set()

        harness.run(wake)
        assert [one.result().status_code for one in waiting] == [200] * 3


def test_where_requests_may_not_wake_it_probes_fail_and_wake_up_does() -> None:
    with RestHarness(wake_on_request=False) as harness:
        harness.client.post("/sleep?level=2")
        assert harness.client.get("/v2/health/ready").status_code == 503
        assert harness.client.get("/v2/health/live").status_code == 200
        refused = harness.client.post("/v1/completions", json=BODY)
        assert (refused.status_code, "asleep" in refused.text) == (503, True)
        assert harness.client.post("/wake_up").status_code == 200
        assert harness.client.post("/v1/completions", json=BODY).status_code == 200


def test_running_requests_end_before_it_sleeps_or_keep_it_awake() -> None:
    with RestHarness(grace_period_seconds=0.1) as harness, ThreadPoolExecutor(1) as pool:
        harness.engine.hold.clear()
        running = pool.submit(harness.client.post, "/v1/completions", json=BODY)
        wait_until(lambda: harness.engine.num_running == 1)
        refused = harness.client.post("/sleep")
        assert (refused.status_code, "1 requests are running" in refused.text) == (503, True)

        async def go_on() -> None:
            harness.engine.hold.set()

        harness.run(go_on)
        assert running.result().status_code == 200
        assert harness.client.post("/sleep").status_code == 200


def test_an_idle_server_falls_asleep_by_itself_and_a_wrong_level_is_named() -> None:
    with RestHarness(idle_sleep_seconds=0.05) as harness:
        harness.call(harness.context.repository._watch_idle)
        wait_until(lambda: is_sleeping(harness))
        assert harness.client.post("/v1/completions", json=BODY).status_code == 200
        wait_until(lambda: is_sleeping(harness))
        refused = harness.client.post("/sleep?level=3")
        assert (refused.status_code, "0, 1 or 2" in refused.text) == (400, True)


def test_one_of_several_models_sleeps_alone() -> None:
    with SeveralHarness("a", "b") as harness:
        assert harness.client.post("/sleep?model=b").status_code == 200
        assert (harness.state("a"), harness.state("b")) == ("ready", "sleeping")
        assert harness.client.get("/is_sleeping?model=b").json() == {"is_sleeping": True}
        assert not is_sleeping(harness)
        assert harness.client.get("/health").json()["state"] == "ready"
        assert harness.complete("a").status_code == 200
        assert harness.complete("b").status_code == 200
        assert harness.client.post("/sleep").status_code == 200
        assert is_sleeping(harness)
        assert harness.client.get("/health").json()["state"] == "sleeping"
        assert harness.client.post("/v2/repository/models/b/unload").status_code == 200
        assert harness.client.post("/wake_up").status_code == 200
        assert (harness.state("a"), harness.state("b")) == ("ready", "unloaded")
        assert harness.client.post("/sleep?model=c").status_code == 404
