"""Another version of a model takes the place of the one that serves: no request is lost, none is of both; and models come and
go with the list of them."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pagoda.errors import CheckpointError
from pagoda.serving import versions
from pagoda.serving.grpc.messages import message_class
from tests.support.checkpoints import shared_checkpoint
from tests.support.fake_engine import FakeEngineClient
from tests.support.grpc_harness import call_method, infer_request
from tests.support.several_models import SeveralHarness
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "UNUSED_SECONDS", 0.05)
    monkeypatch.setattr(versions, "LOOK_SECONDS", 0.01)


def load(harness: SeveralHarness, name: str = "chat", config: dict[str, Any] | None = None, **parameters: Any) -> Any:
    if config is not None:
        parameters["config"] = json.dumps(config)
    return harness.client.post(f"/v2/repository/models/{name}/load", json={"parameters": parameters})


def infer(harness: SeveralHarness, version: str | None = None) -> Any:
    path = "/v2/models/chat" + (f"/versions/{version}" if version else "")
    return harness.client.post(
        f"{path}/infer",
        json={
            "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["a b c"]}],
            "parameters": {"max_tokens": 3},
        },
    )


def index(harness: SeveralHarness, name: str = "chat") -> list[tuple[str, str]]:
    entries = harness.client.post("/v2/repository/index").json()
    return [(entry["version"], entry["state"]) for entry in entries if entry["name"] == name]


@pytest.fixture
def harness() -> Any:
    with SeveralHarness("chat", "other", max_loaded_models=3) as running:
        yield running


def test_a_version_takes_over_between_requests_which_end_with_the_one_they_began_with(harness: SeveralHarness) -> None:
    first = harness.engines["chat"]
    first.hold.clear()
    harness.on_made = lambda engine: setattr(engine, "script", [7])
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(infer, harness)
        streaming = pool.submit(harness.complete, "chat")
        wait_until(lambda: first.num_running == 2)
        assert load(harness, config={"default_max_tokens": 9}).status_code == 200
        assert index(harness) == [("2", "READY"), ("1", "UNAVAILABLE")]  # which drains
        versions_of_health = harness.client.get("/health").json()["models"][0]["versions"]
        assert [(one["version"], one["state"]) for one in versions_of_health] == [("2", "ready"), ("1", "draining")]
        new = infer(harness)
        assert new.json()["model_version"] == "2"
        assert infer(harness, "2").status_code == 200
        old = infer(harness, "1")
        assert (old.status_code, "version '2' serves" in old.text) == (503, True), old.text
        assert infer(harness, "3").status_code == 404
        response = call_method(harness.channel, "ModelInfer")(infer_request("x", model_name="chat"), timeout=20)
        assert response.model_version == "2"
        assert first.num_running == 2
        harness.call(first.hold.set)
        assert running.result().json()["model_version"] == "1"
        assert running.result().json()["outputs"] != new.json()["outputs"]
        assert streaming.result().status_code == 200
    wait_until(lambda: index(harness) == [("2", "READY")])
    assert str(first.health.state) == "dead"
    assert infer(harness, "1").status_code == 404
    assert harness.client.get("/v2/models/chat").json()["versions"] == ["2"]
    assert not harness.made[0].aborted
    assert not first.aborted


def test_a_version_that_cannot_be_loaded_leaves_the_one_before_and_says_why(harness: SeveralHarness) -> None:
    def broken(engine: FakeEngineClient) -> None:
        engine.load_error = CheckpointError("the test wants it broken")

    harness.on_made = broken
    for strategy in ("RollingUpdate", "Recreate"):
        failed = load(harness, config={"default_max_tokens": 9}, strategy=strategy)
        assert failed.status_code >= 400
        assert "the test wants it broken" in failed.text
        assert infer(harness, "1").json()["model_version"] == "1"
        entries = harness.client.post("/v2/repository/index").json()
        reasons = {(entry["version"], entry["reason"]) for entry in entries if entry["name"] == "chat"}
        assert ("1", "") in reasons
        assert any("broken" in reason for _, reason in reasons)
        assert harness.client.get("/v2/health/ready").status_code == 200
    harness.on_made = lambda engine: None
    assert load(harness, config={"default_max_tokens": 9}).status_code == 200
    wait_until(lambda: index(harness) == [("4", "READY")])


def test_where_both_have_no_room_it_is_refused_or_the_first_is_ended_and_requests_wait() -> None:
    with SeveralHarness("chat", "other") as harness, ThreadPoolExecutor(2) as pool:
        refused = load(harness, config={"default_max_tokens": 9})
        assert refused.status_code == 503
        assert "With strategy Recreate version 1 is ended first" in refused.text
        assert index(harness)[0] == ("1", "READY")
        harness.on_made = lambda engine: engine.may_load.clear()
        loading = pool.submit(load, harness, config={"default_max_tokens": 9}, strategy="Recreate")
        wait_until(lambda: len(harness.made) == 1)
        waiting = pool.submit(infer, harness)
        assert index(harness) == [("1", "UNAVAILABLE"), ("3", "LOADING")]
        assert harness.complete("other").status_code == 200
        harness.call(harness.made[0].may_load.set)
        assert loading.result().status_code == 200
        assert waiting.result().json()["model_version"] == "3"


def test_what_is_no_other_version_and_how_one_may_be_named(harness: SeveralHarness) -> None:
    assert load(harness).status_code == 200
    assert load(harness, config={}).status_code == 200
    assert index(harness) == [("1", "READY")]
    assert load(harness, config={"default_max_tokens": 5}, version="2026-11").status_code == 200
    assert infer(harness).json()["model_version"] == "2026-11"
    assert load(harness, config={"default_max_tokens": 5}).status_code == 200  # as it is
    assert load(harness).status_code == 200  # what it was loaded with it keeps
    assert infer(harness).json()["model_version"] == "2026-11"
    for parameters, piece in (
        ({"version": "2026-11", "config": {"default_max_tokens": 6}}, "has a version '2026-11' already"),
        ({"version": "a/b"}, "up to 64 letters"),
        ({"strategy": "Canary"}, "must be RollingUpdate or Recreate"),
        ({"config": {"model_aliases": ["other"]}}, "every version of a model has the same"),
        ({"versions": "2"}, "config, version and strategy are allowed"),
    ):
        refused = load(harness, **parameters)
        assert (refused.status_code, piece in refused.text) == (400, True), refused.text
    request = message_class("RepositoryModelLoadRequest")(model_name="chat")
    request.parameters["version"].string_param = "7"
    assert call_method(harness.channel, "RepositoryModelLoad")(request, timeout=20).isLoaded
    assert infer(harness, "7").status_code == 200
    assert load(harness, config={"default_max_tokens": 8}).status_code == 200
    assert infer(harness, "8").status_code == 200


def test_changed_files_are_another_version_whether_it_is_loaded_or_not(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(shared_checkpoint(), checkpoint)
    entries = {"chat": {"model": str(checkpoint)}}
    with SeveralHarness("chat", "other", entries=entries, max_loaded_models=3) as harness:
        (checkpoint / "config.json").touch()
        assert load(harness).status_code == 200
        assert infer(harness).json()["model_version"] == "2"
        for version in ("2", "3"):  # the same files are the same version
            assert harness.client.post("/v2/repository/models/chat/unload").status_code == 200
            assert load(harness).status_code == 200
            assert infer(harness).json()["model_version"] == version
            (checkpoint / "config.json").touch()


def test_administrators_who_do_several_things_at_once(harness: SeveralHarness) -> None:
    with ThreadPoolExecutor(8) as pool:
        same = [pool.submit(load, harness, config={"default_max_tokens": 5}) for _ in range(4)]
        assert [one.result().status_code for one in same] == [200] * 4
        assert len(harness.made) == 1
        # One is unloaded while another version of it loads.
        harness.on_made = lambda engine: engine.may_load.clear()
        loading = pool.submit(load, harness, config={"default_max_tokens": 6})
        wait_until(lambda: len(harness.made) == 2)
        refused = harness.client.patch("/settings?model=chat", json={"default_max_tokens": 7})
        assert (refused.status_code, "is loading" in refused.text) == (503, True), refused.text
        assert harness.client.post("/v2/repository/models/chat/unload").status_code == 200
        assert loading.result().status_code == 503
        assert "unloaded meanwhile" in loading.result().text
        assert str(harness.made[1].health.state) == "dead"
        assert index(harness) == [("2", "UNAVAILABLE")]
        harness.on_made = lambda engine: None
        assert load(harness).status_code == 200


def test_counts_of_a_model_go_on_over_its_versions(harness: SeveralHarness) -> None:
    def value(name: str) -> float:
        line = next(line for line in harness.client.get("/metrics").text.splitlines() if line.startswith(name))
        return float(line.rsplit(" ", 1)[1])

    harness.complete("chat")
    series = 'pagoda_engine_state_transitions_total{from="starting",model_name="chat",to="ready"}'
    tokens = value('pagoda_generation_tokens_total{model_name="chat"}')
    moves = value(series)
    assert load(harness, config={"default_max_tokens": 5}).status_code == 200
    harness.complete("chat")
    assert value('pagoda_generation_tokens_total{model_name="chat"}') == 2 * tokens
    assert value(series) >= moves
    assert value('pagoda_engine_state{model_name="chat",state="ready"}') == 1


def test_no_request_is_lost_or_mixed_while_versions_follow_each_other(harness: SeveralHarness) -> None:
    def script(engine: FakeEngineClient) -> None:
        engine.script = [10 + len(harness.made)]
        engine.step_seconds = 0.002

    harness.engines["chat"].script = [10]
    harness.on_made = script
    answers: list[Any] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            answers.append(infer(harness))

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask) for _ in range(6)]
        for tokens in range(5, 11):
            assert load(harness, config={"default_max_tokens": tokens}).status_code == 200
        is_over.set()
        for one in asking:
            one.result()
    assert {answer.status_code for answer in answers} == {200}
    seen = set()
    for answer in answers:
        ids = next(one["data"] for one in answer.json()["outputs"] if one["name"] == "output_ids")
        assert ids[0] == 9 + int(answer.json()["model_version"])
        seen.add(answer.json()["model_version"])
    assert len(seen) > 3
    wait_until(lambda: index(harness) == [("7", "READY")])


def names(harness: SeveralHarness) -> list[str]:
    return [card["id"] for card in harness.client.get("/v1/models").json()["data"]]


def test_models_come_go_and_change_with_the_list_while_the_others_stream(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = {"model": str(shared_checkpoint())}
    models: dict[str, Any] = {"chat": checkpoint, "other": checkpoint}
    with SeveralHarness("chat", "other", max_loaded_models=3) as harness, ThreadPoolExecutor(1) as pool:
        harness.engines["chat"].hold.clear()
        running = pool.submit(harness.complete, "chat")
        wait_until(lambda: harness.engines["chat"].num_running == 1)
        harness.reload(models={**models, "pub/new": {**checkpoint, "model_aliases": ["newest"]}})
        assert names(harness) == ["chat", "other", "pub/new", "newest"]
        assert harness.complete("newest").json()["model"] == "pub/new"
        assert harness.client.get("/v2/models/pub/new/ready").status_code == 200
        assert 'pagoda_engine_state{model_name="pub/new",state="ready"} 1.0' in harness.client.get("/metrics").text
        # What changes while it runs changes so, the rest with another version.
        changed = {**checkpoint, "default_max_tokens": 2}
        harness.reload(models={"chat": checkpoint, "other": changed})
        assert names(harness) == ["chat", "other"]
        assert harness.complete("pub/new").status_code == 404
        assert "pub/new" not in str(harness.client.get("/health").json())
        assert index(harness, "other") == [("1", "READY")]
        short = harness.client.post("/v1/completions", json={"model": "other", "prompt": "x y"}).json()
        assert short["usage"]["completion_tokens"] == 2
        harness.reload(models={"chat": checkpoint, "other": {**changed, "max_model_len": 64}})
        assert index(harness, "other")[0] == ("2", "READY")
        # What is wrong changes nothing.
        for wrong, piece in (
            ({"chat": checkpoint, "other": {**checkpoint, "model_aliases": ["chat"]}}, "the same name"),
            ({"chat": checkpoint, "other": {"modell": "x"}}, "unknown setting"),
        ):
            harness.reload(models=wrong)
            assert piece in caplog.text
            assert names(harness) == ["chat", "other"]
        harness.call(harness.engines["chat"].hold.set)
        assert running.result().status_code == 200
        assert not harness.engines["chat"].aborted


def test_a_model_that_was_added_and_cannot_be_loaded_leaves_the_server_ready() -> None:
    checkpoint = {"model": str(shared_checkpoint())}

    def broken(engine: FakeEngineClient) -> None:
        engine.load_error = CheckpointError("the test wants it broken")

    with SeveralHarness("chat", max_loaded_models=2) as harness:
        harness.on_made = broken
        harness.reload(models={"chat": checkpoint, "new": checkpoint})
        assert harness.client.get("/v2/health/ready").status_code == 200
        refused = harness.complete("new")
        assert (refused.status_code, "the test wants it broken" in refused.text) == (503, True), refused.text
        harness.call(lambda: setattr(harness.engines["new"], "load_error", None))
        assert load(harness, "new").status_code == 200
        assert harness.complete("new").status_code == 200


def test_checkpoints_come_into_an_empty_directory_and_one_is_loaded_when_it_is_asked_for(tmp_path: Path) -> None:
    with SeveralHarness(model_dir_root=str(tmp_path), max_loaded_models=2) as harness:
        assert (names(harness), harness.client.get("/v2/health/ready").status_code) == ([], 200)
        for body in ({"model": "first"}, {}):
            refused = harness.client.post("/v1/completions", json={"prompt": "a", **body})
            assert (refused.status_code, "served here" in refused.text) == (404, True)
        health = harness.client.get("/health").json()
        assert (health["state"], health["models"]) == ("ready", [])
        assert harness.client.get("/metrics").status_code == 200
        (tmp_path / "first").symlink_to(shared_checkpoint())
        harness.run(harness.settings.look_for_models)
        assert names(harness) == ["first"]
        assert harness.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        assert load(harness, "second").status_code == 404
        (tmp_path / "second").symlink_to(shared_checkpoint())
        assert load(harness, "second").status_code == 200  # as KServe's agent asks, once it has fetched one
        assert harness.complete("second").status_code == 200
        (tmp_path / "second").unlink()
        harness.run(harness.settings.look_for_models)
        assert harness.complete("second").status_code == 404
        assert names(harness) == ["first"]
