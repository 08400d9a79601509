"""Several models in one server: each is asked for by name, comes and goes by itself, and is nothing to the others."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from pagoda.errors import CheckpointError
from pagoda.serving import repository
from pagoda.serving.grpc.messages import message_class
from tests.support.grpc_harness import call_method, infer_request
from tests.support.several_models import SeveralHarness
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def two() -> Iterator[SeveralHarness]:
    with SeveralHarness("chat", "draft", entries={"draft": {"model_aliases": ["small", "pub/small"]}}) as harness:
        yield harness


def test_each_protocol_finds_the_model_that_is_asked_for(two: SeveralHarness) -> None:
    messages = [{"role": "user", "content": "x"}]
    requests = {
        "/v1/completions": {"prompt": "x", "max_tokens": 1},
        "/v1/chat/completions": {"messages": messages, "max_tokens": 1},
        "/v1/responses": {"input": "x", "max_output_tokens": 1},
        "/v1/messages": {"messages": messages, "max_tokens": 1},
        "/api/generate": {"prompt": "x", "stream": False, "options": {"num_predict": 1}},
        "/invocations": {"prompt": "x", "max_tokens": 1},
    }
    for path, body in requests.items():
        for name, engine in two.engines.items():
            before = len(engine.submitted)
            answer = two.client.post(path, json={"model": name, **body})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == name
            assert len(engine.submitted) == before + 1, path
    for name in two.engines:
        answer = two.client.post(
            f"/v2/models/{name}/generate", json={"text_input": "x", "parameters": {"max_tokens": 1}}
        )
        assert answer.json()["model_name"] == name
        response = call_method(two.channel, "ModelInfer")(infer_request("x", model_name=name), timeout=20)
        assert response.model_name == name


def test_aliases_a_header_and_no_name_at_all(two: SeveralHarness) -> None:
    assert two.complete("pub/small").json()["model"] == "draft"
    header = {"x-llm-d-model-name-rewrite": "draft"}
    assert two.client.post("/v1/completions", json={"prompt": "x"}, headers=header).json()["model"] == "draft"
    assert two.client.post("/v1/completions", json={"prompt": "x"}).json()["model"] == "chat"  # the first
    answer = two.complete("other")
    assert answer.status_code == 404
    assert "the served models are chat, draft" in answer.json()["error"]["message"]
    listed = two.client.get("/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["chat", "draft", "small", "pub/small"]


def test_metrics_are_labelled_by_model_and_each_family_stands_once(two: SeveralHarness) -> None:
    two.complete("draft")
    text = two.client.get("/metrics").text
    types = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    for name in ("chat", "draft"):
        assert f'pagoda_generation_tokens_total{{model_name="{name}"}}' in text
        assert f'pagoda_engine_state{{model_name="{name}",state="ready"}} 1.0' in text
    before = two.context.models.find("draft").metrics.value("request_errors_total", kind="invalid_request")
    assert two.complete("draft", temperature=-1).status_code == 400
    assert two.context.models.find("draft").metrics.value("request_errors_total", kind="invalid_request") == before + 1
    assert two.context.models.find("chat").metrics.value("request_errors_total", kind="invalid_request") == 0


def test_load_and_unload_over_rest_and_grpc_while_another_model_streams() -> None:
    with SeveralHarness("chat", "other") as harness:
        alone = harness.complete("chat", max_tokens=200).json()["choices"][0]["text"]
        harness.engines["chat"].step_seconds = 0.005
        with ThreadPoolExecutor(4) as pool:
            streams = [pool.submit(harness.complete, "chat", max_tokens=200) for _ in range(4)]
            for _ in range(3):
                answer = harness.client.post("/v2/repository/models/other/unload")
                assert answer.json() == {"name": "other", "unload": True}
                assert harness.complete("other").status_code == 503
                assert harness.client.get("/v2/health/ready").status_code == 200  # nobody waits for it any more
                request = message_class("RepositoryModelLoadRequest")(model_name="other")
                assert call_method(harness.channel, "RepositoryModelLoad")(request, timeout=20).isLoaded
                assert harness.complete("other").status_code == 200
            assert {stream.result().json()["choices"][0]["text"] for stream in streams} == {alone}
        index = harness.client.post("/v2/repository/index").json()
        assert [(one["name"], one["state"]) for one in index] == [("chat", "READY"), ("other", "READY")]


def test_running_requests_of_a_model_that_is_unloaded_are_finished() -> None:
    with SeveralHarness("chat", "other") as harness, ThreadPoolExecutor(1) as pool:
        harness.engines["other"].hold.clear()
        running = pool.submit(harness.complete, "other")
        wait_until(lambda: bool(harness.engines["other"].submitted))
        unloading = threading.Thread(target=lambda: harness.client.post("/v2/repository/models/other/unload"))
        unloading.start()
        wait_until(lambda: harness.state("other") == "draining")
        refused = harness.complete("other")
        assert (refused.status_code, "being unloaded" in refused.text) == (503, True)
        harness.run(_set, harness.engines["other"].hold)
        assert running.result().status_code == 200
        unloading.join(20)
        assert harness.state("other") == "unloaded"


async def _set(event: object) -> None:
    event.set()  # type: ignore[attr-defined]


def test_a_model_that_cannot_be_loaded_says_why_itself_and_nowhere_else(tmp_path: Path) -> None:
    missing = str(tmp_path)
    with SeveralHarness("chat", "broken", entries={"broken": {"model": missing}}, load_models=("chat",)) as harness:
        assert harness.client.get("/v2/health/ready").status_code == 200
        failed = harness.client.post("/v2/repository/models/broken/load")
        assert failed.status_code >= 400
        assert missing in failed.text
        assert harness.complete("chat").status_code == 200
        report = harness.client.get("/health").json()
        causes = {model["name"]: (model["state"], model["cause"]) for model in report["models"]}
        assert causes["broken"][0] == "dead"
        assert missing in causes["broken"][1]
        assert missing not in str(causes["chat"])
        assert harness.client.get("/v2/health/live").status_code == 200
        # It was asked for, and is not there.
        assert harness.client.get("/v2/health/ready").status_code == 503
        assert harness.client.get("/v2/models/chat/ready").status_code == 200
        harness.client.post("/v2/repository/models/broken/unload")
        assert harness.client.get("/v2/health/ready").status_code == 200


def test_ready_when_all_that_must_be_there_are_and_live_all_along() -> None:
    with SeveralHarness("chat", "other", held=("other",)) as harness:
        wait_until(lambda: harness.state("chat") == "ready")
        assert harness.complete("chat").status_code == 200
        assert harness.client.get("/v2/health/live").status_code == 200
        ready = harness.client.get("/v2/health/ready")
        assert (ready.status_code, "other" in ready.json()["error"]) == (503, True)
        assert harness.client.get("/health").json()["started"] is False
        harness.run(_set, harness.engines["other"].may_load)
        wait_until(lambda: harness.client.get("/v2/health/ready").status_code == 200)
        assert harness.client.get("/health").json()["started"] is True


def test_requests_wait_for_a_model_that_loads_and_no_longer_than_they_may() -> None:
    with SeveralHarness("chat", "other", load_on_demand=True) as harness, ThreadPoolExecutor(3) as pool:
        assert harness.client.get("/v2/health/ready").status_code == 200  # none must be there
        assert {harness.state(name) for name in harness.engines} == {"unloaded"}
        assert harness.complete("chat").status_code == 200
        assert (harness.state("chat"), harness.state("other")) == ("ready", "unloaded")
        harness.call(harness.engines["other"].may_load.clear)
        waiting = [pool.submit(harness.complete, "other") for _ in range(2)]
        wait_until(lambda: harness.state("other") == "starting")
        assert harness.complete("chat").status_code == 200
        headers = {"x-request-timeout-seconds": "0.05"}
        late = harness.client.post("/v1/completions", json={"model": "other", "prompt": "x"}, headers=headers)
        assert late.status_code in (200, 504)
        with pytest.raises(grpc.RpcError) as caught:
            call_method(harness.channel, "ModelInfer")(infer_request("x", model_name="other"), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        harness.run(_set, harness.engines["other"].may_load)
        assert [one.result().status_code for one in waiting] == [200, 200]


def test_the_idle_model_that_was_used_longest_ago_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "MIN_IDLE_SECONDS", 0.01)
    with SeveralHarness("a", "b", "c", load_on_demand=True, max_loaded_models=2) as harness:
        for name in ("a", "b", "a", "c"):
            assert harness.complete(name).status_code == 200
            time.sleep(0.02)
        assert [harness.state(name) for name in "abc"] == ["ready", "unloaded", "ready"]
        # A model that somebody asked to be loaded stays.
        for name in ("a", "c"):
            assert harness.client.post(f"/v2/repository/models/{name}/load").status_code == 200
        refused = harness.complete("b")
        assert refused.status_code == 503
        assert "no room for model 'b'" in refused.text


def test_a_busy_model_is_not_unloaded_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "MIN_IDLE_SECONDS", 0.01)
    with (
        SeveralHarness("a", "b", load_on_demand=True, max_loaded_models=1) as harness,
        ThreadPoolExecutor(2) as pool,
    ):
        assert harness.complete("a").status_code == 200
        harness.engines["a"].hold.clear()
        running = pool.submit(harness.complete, "a")
        wait_until(lambda: harness.engines["a"].num_running == 1)
        waiting = pool.submit(harness.complete, "b")
        time.sleep(0.1)
        assert (harness.state("a"), harness.state("b")) == ("ready", "unloaded")
        harness.run(_set, harness.engines["a"].hold)
        assert running.result().status_code == 200
        assert waiting.result().status_code == 200
        assert (harness.state("a"), harness.state("b")) == ("unloaded", "ready")


def test_three_that_are_wanted_by_many_at_once_take_turns_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "MIN_IDLE_SECONDS", 0.01)
    with (
        SeveralHarness("a", "b", "c", load_on_demand=True, max_loaded_models=1) as harness,
        ThreadPoolExecutor(30) as pool,
    ):
        asked = [pool.submit(harness.complete, name) for name in "abc" * 10]
        assert [one.result().status_code for one in asked] == [200] * 30
        assert sorted(harness.state(name) for name in "abc") == ["ready", "unloaded", "unloaded"]


def test_an_idle_model_is_unloaded_after_a_time_unless_it_must_be_there() -> None:
    with SeveralHarness("a", "b", load_on_demand=True, load_models=("a",), idle_unload_seconds=0.05) as harness:
        assert harness.complete("b").status_code == 200
        wait_until(lambda: harness.state("b") == "unloaded")
        assert harness.state("a") == "ready"
        assert harness.complete("b").status_code == 200


def test_settings_of_a_load_hold_until_the_next_one_and_wrong_ones_are_named() -> None:
    with SeveralHarness("a", "b", max_loaded_models=3) as harness:
        body = {"parameters": {"config": json.dumps({"default_max_tokens": 3})}}
        assert harness.client.post("/v2/repository/models/b/load", json=body).status_code == 200
        text = harness.client.post("/v1/completions", json={"model": "b", "prompt": "x y"}).json()
        assert text["usage"]["completion_tokens"] == 3
        for config, piece in (
            ({"http_port": 1}, "http_port: is the server's"),
            ({"max_num_seq": 1}, "did you mean max_num_seqs"),
            ({"max_num_seqs": 0}, "at least 1"),
            ("[", "not JSON"),
        ):
            written = config if isinstance(config, str) else json.dumps(config)
            body = {"parameters": {"config": written}}
            refused = harness.client.post("/v2/repository/models/b/load", json=body)
            assert (refused.status_code, piece in refused.text) == (400, True), refused.text
        assert harness.complete("b").status_code == 200
        assert harness.client.post("/v2/repository/models/b/unload").status_code == 200
        assert harness.client.post("/v2/repository/models/b/load").status_code == 200
        again = harness.client.post("/v1/completions", json={"model": "b", "prompt": "x y"}).json()
        assert again["usage"]["completion_tokens"] > 3


def test_an_engine_that_dies_takes_no_other_with_it() -> None:
    with SeveralHarness("a", "b") as harness:
        harness.engines["b"].load_error = CheckpointError("the test wants it dead")
        harness.client.post("/v2/repository/models/b/unload")
        assert "the test wants it dead" in harness.client.post("/v2/repository/models/b/load").text
        assert harness.complete("b").status_code == 503
        assert harness.complete("a").status_code == 200
        harness.engines["b"].load_error = None
        assert harness.client.post("/v2/repository/models/b/load").status_code == 200
        assert harness.complete("b").status_code == 200
