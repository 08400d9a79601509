"""Many administrators and clients at once, who ask for things in the wrong order: every call ends, and so does every load."""

from __future__ import annotations

import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pagoda.serving import repository
from tests.support.checkpoints import shared_checkpoint
from tests.support.fake_engine import FakeEngineClient
from tests.support.several_models import SeveralHarness
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def starts(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each engine was started."""
    monkeypatch.setattr(repository, "MIN_IDLE_SECONDS", 0.01)
    counts: Counter[int] = Counter()
    start = FakeEngineClient.start

    async def counted(engine: FakeEngineClient) -> None:
        counts[id(engine)] += 1
        await start(engine)

    monkeypatch.setattr(FakeEngineClient, "start", counted)
    return counts


async def _set(event: object) -> None:
    event.set()  # type: ignore[attr-defined]


def test_fifty_loads_of_one_name_are_one_load(starts: Counter[int]) -> None:
    with SeveralHarness("a", "b", load_models=("a",)) as harness, ThreadPoolExecutor(50) as pool:
        engine = harness.engines["b"]
        harness.call(engine.may_load.clear)
        loads = [pool.submit(harness.client.post, "/v2/repository/models/b/load") for _ in range(50)]
        wait_until(lambda: harness.state("b") == "starting")
        harness.run(_set, engine.may_load)
        assert {one.result().status_code for one in loads} == {200}
        assert (starts[id(engine)], harness.state("b")) == (1, "ready")


def test_a_load_that_comes_while_the_model_is_unloaded_or_loads_and_an_unload_while_it_loads(
    starts: Counter[int],
) -> None:
    with SeveralHarness("a", "b", load_models=("b",)) as harness, ThreadPoolExecutor(4) as pool:
        engine, post = harness.engines["b"], harness.client.post
        engine.hold.clear()
        running = pool.submit(harness.complete, "b")
        wait_until(lambda: engine.num_running == 1)
        unload = pool.submit(post, "/v2/repository/models/b/unload")
        wait_until(lambda: harness.state("b") == "draining")
        load = pool.submit(post, "/v2/repository/models/b/load")  # waits for the end of the unload
        harness.run(_set, engine.hold)
        assert (running.result().status_code, unload.result().status_code) == (200, 200)
        assert (load.result().status_code, harness.state("b"), starts[id(engine)]) == (200, "ready", 2)

        assert post("/v2/repository/models/b/unload").status_code == 200
        harness.call(engine.may_load.clear)
        load = pool.submit(post, "/v2/repository/models/b/load")
        wait_until(lambda: harness.state("b") == "starting")
        assert post("/v2/repository/models/b/unload").status_code == 200
        assert (load.result().status_code, "was unloaded meanwhile" in load.result().text) == (503, True)
        assert harness.state("b") == "unloaded"
        harness.run(_set, engine.may_load)
        assert post("/v2/repository/models/b/load").status_code == 200
        assert harness.complete("b").status_code == 200


def test_a_directory_that_goes_while_its_model_loads_or_before(tmp_path: Path) -> None:
    directory = shutil.copytree(shared_checkpoint(), tmp_path / "here")
    entries = {"b": {"model": str(directory)}}
    with SeveralHarness("a", "b", entries=entries, load_models=("a",)) as harness, ThreadPoolExecutor(1) as pool:
        engine, post = harness.engines["b"], harness.client.post
        harness.call(engine.may_load.clear)
        load = pool.submit(post, "/v2/repository/models/b/load")
        wait_until(lambda: harness.state("b") == "starting")
        shutil.rmtree(directory)
        harness.run(_set, engine.may_load)
        assert load.result().status_code in (200, 400, 500, 503)  # 200: it was read before
        post("/v2/repository/models/b/unload")
        failed = post("/v2/repository/models/b/load")
        assert (failed.status_code >= 400, str(directory) in failed.text) == (True, True), failed.text
        assert harness.complete("a").status_code == 200


def test_a_deadline_that_passes_while_a_model_loads_ends_the_request_and_not_the_load(starts: Counter[int]) -> None:
    with SeveralHarness("a", "b", load_on_demand=True, request_timeout_seconds=0.2) as harness:
        engine = harness.engines["b"]
        harness.call(engine.may_load.clear)
        late = [harness.complete("b") for _ in range(2)]
        assert [one.status_code for one in late] == [504, 504]
        harness.run(_set, engine.may_load)
        wait_until(lambda: harness.state("b") == "ready")
        assert (harness.complete("b").status_code, starts[id(engine)]) == (200, 1)
