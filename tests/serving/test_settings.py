"""Settings while the server runs: shown with their sources, changed as a whole or not at all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagoda.config.sources import load
from pagoda.errors import ConfigError
from pagoda.serving.settings import Settings
from tests.support.checkpoints import shared_checkpoint
from tests.support.rest_harness import RestHarness
from tests.support.several_models import SeveralHarness


@pytest.fixture(scope="module")
def harness() -> Iterator[RestHarness]:
    with RestHarness(max_num_waiting=9) as running:
        yield running


def setting(harness: RestHarness, name: str, **query: str) -> dict[str, Any]:
    return dict(harness.client.get("/settings", params=query).json()["settings"][name])


def generation(harness: RestHarness) -> int:
    return int(harness.client.get("/settings").json()["generation"])


def test_each_setting_is_shown_with_its_source_and_whether_it_can_change(harness: RestHarness) -> None:
    assert setting(harness, "max_num_waiting") == {
        "value": 9,
        "default": 1024,
        "source": "test",
        "can_change": True,
        "note": "between two steps of the engine",
    }
    assert setting(harness, "tensor_parallel_size")["can_change"] is False
    assert setting(harness, "tensor_parallel_size")["note"] == "needs a restart"
    assert setting(harness, "api_keys")["value"] == "()"


def test_a_change_reaches_engine_server_and_text_and_is_counted_and_audited(
    harness: RestHarness, caplog: pytest.LogCaptureFixture
) -> None:
    before = generation(harness)
    body = {"max_num_waiting": 5, "request_timeout_seconds": 30, "default_max_tokens": 3, "runaway_detection": "stop"}
    with caplog.at_level(logging.INFO, "pagoda.audit"):
        answer = harness.client.patch("/settings", json=body)
    assert answer.status_code == 200, answer.text
    changed = answer.json()["changed"]
    assert changed["max_num_waiting"] == {"before": 9, "after": 5}
    assert harness.engine.settings == {"max_num_waiting": 5, "repetition_detection": "stop"}
    assert harness.context.models.default.runner.request_timeout_seconds == 30
    text = harness.client.post("/v1/completions", json={"prompt": "a b"}).json()
    assert text["usage"]["completion_tokens"] == 3
    assert generation(harness) == before + 1
    assert harness.context.metrics.value("settings_generation") == before + 1
    assert "max_num_waiting 9 -> 5" in caplog.text
    assert "PATCH by anonymous" in setting(harness, "max_num_waiting")["source"]
    harness.client.patch("/settings", json={"default_max_tokens": "none", "max_num_waiting": 9})


@pytest.mark.parametrize(
    ("changes", "piece"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: cannot change while the server runs"),
        ({"max_num_waiting": 0}, "at least 1"),
        ({"max_num_wating": 1}, "did you mean max_num_waiting"),
        ({"runaway_max_period": 200, "runaway_min_tokens": 300}, "at most half"),
        ({"chat_template": "/nowhere.jinja"}, "no such file"),
        ({"speculative_config": {"method": "ngram"}}, "needs a restart"),
        ({"model_name": "x"}, "model_name"),
        ({}, "must have a setting"),
    ],
)
def test_what_cannot_be_is_named_and_nothing_of_the_request_is_done(
    harness: RestHarness, changes: dict[str, Any], piece: str
) -> None:
    before = generation(harness), dict(harness.engine.settings), setting(harness, "grace_period_seconds")
    body = {"grace_period_seconds": 7, **changes} if changes else {}
    answer = harness.client.patch("/settings", json=body)
    assert (answer.status_code, piece in answer.text) == (400, True), answer.text
    assert (generation(harness), dict(harness.engine.settings), setting(harness, "grace_period_seconds")) == before


def test_where_the_engine_refuses_nothing_has_changed(harness: RestHarness) -> None:
    before = generation(harness)
    harness.engine.reconfigure_error = ConfigError("max_num_seqs=99: must be at most 16, what was sized at start")
    body = {"max_num_seqs": 99, "default_max_tokens": 2, "request_timeout_seconds": 1}
    answer = harness.client.patch("/settings", json=body)
    harness.engine.reconfigure_error = None
    assert (answer.status_code, "sized at start" in answer.text) == (400, True)
    assert generation(harness) == before
    assert setting(harness, "default_max_tokens")["value"] is None
    assert harness.client.post("/v1/completions", json={"prompt": "a b"}).json()["usage"]["completion_tokens"] > 2


def test_a_template_takes_over_with_the_next_request_and_running_ones_end_with_theirs(
    harness: RestHarness, tmp_path: Path
) -> None:
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }} other{% endfor %}")
    messages = [{"role": "user", "content": "a"}]
    before = harness.client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert harness.client.patch("/settings", json={"chat_template": str(template)}).status_code == 200
    after = harness.client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    plain = harness.client.post("/tokenize", json={"prompt": "a other", "add_special_tokens": False}).json()["tokens"]
    assert before != after == plain
    assert harness.client.patch("/settings", json={"chat_template": None}).status_code == 200
    assert harness.client.post("/tokenize", json={"messages": messages}).json()["tokens"] == before


def test_the_log_level_is_that_of_the_server_and_its_engine(harness: RestHarness) -> None:
    logger = logging.getLogger("pagoda")
    before = logger.level
    try:
        assert harness.client.patch("/settings", json={"log_level": "warning"}).status_code == 200
        assert logger.level == logging.WARNING
        assert harness.engine.settings["log_level"] == "warning"
    finally:
        harness.client.patch("/settings", json={"log_level": "info"})
        logger.setLevel(before)


def test_one_of_several_models_or_all_of_them() -> None:
    with SeveralHarness("a", "b") as harness:
        assert harness.client.patch("/settings?model=b", json={"max_num_waiting": 3}).status_code == 200
        assert (harness.engines["a"].settings, harness.engines["b"].settings) == ({}, {"max_num_waiting": 3})
        assert setting(harness, "max_num_waiting", model="b")["value"] == 3
        assert setting(harness, "max_num_waiting", model="a")["value"] == 1024
        refused = harness.client.patch("/settings?model=b", json={"log_level": "debug"})
        assert (refused.status_code, "is the server's" in refused.text) == (400, True)
        assert harness.client.patch("/settings?model=c", json={"max_num_waiting": 3}).status_code == 404
        # The second refuses: the first has its old value again.
        harness.engines["b"].reconfigure_error = ConfigError("no")
        assert harness.client.patch("/settings", json={"max_num_waiting": 7}).status_code == 400
        assert harness.engines["a"].settings["max_num_waiting"] == 1024
        harness.engines["b"].reconfigure_error = None
        assert harness.client.patch("/settings", json={"max_num_waiting": 7}).status_code == 200
        assert {engine.settings["max_num_waiting"] for engine in harness.engines.values()} == {7}
        # What is not loaded has the settings when it is.
        harness.client.post("/v2/repository/models/b/unload")
        assert harness.client.patch("/settings?model=b", json={"default_max_tokens": 2}).status_code == 200
        harness.client.post("/v2/repository/models/b/load")
        answer = harness.client.post("/v1/completions", json={"model": "b", "prompt": "x"}).json()
        assert answer["usage"]["completion_tokens"] == 2


def test_a_file_that_changes_is_applied_whole_or_not_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "pagoda.yaml"
    start = f"model: {shared_checkpoint()}\nmodel_name: demo\ntokenizer_pool_size: 1\n"
    file.write_text(start)
    arguments = ["--config", str(file)]
    with RestHarness() as harness:
        settings = Settings(harness.context, load(arguments, {}), lambda: load(arguments, {}))
        file.write_text(start + "max_num_waiting: 4\n")
        harness.run(settings.reload, "SIGHUP")
        assert harness.engine.settings == {"max_num_waiting": 4}
        assert settings.shown()["max_num_waiting"]["source"] == "SIGHUP"
        file.write_text(start + "max_num_waiting: 5\nblock_size: 32\n")
        harness.run(settings.reload, "SIGHUP")
        assert harness.engine.settings == {"max_num_waiting": 4}
        assert "block_size: cannot change while the server runs" in caplog.text
        file.write_text(start + "max_num_waiting: [\n")
        harness.run(settings.reload, "SIGHUP")
        assert harness.engine.settings == {"max_num_waiting": 4}
        file.write_text(start)
        harness.run(settings.reload, "SIGHUP")
        assert harness.engine.settings == {"max_num_waiting": 1024}


async def test_the_file_is_watched_also_where_it_is_a_link_that_is_set_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagoda.serving.settings.WATCH_SECONDS", 0.01)
    for name in ("one", "two"):
        (tmp_path / name).write_text("max_num_waiting: 4\n")
    link = tmp_path / "pagoda.yaml"
    link.symlink_to(tmp_path / "one")
    reloads: list[str] = []
    changed = asyncio.Event()

    class Watched(Settings):
        def __init__(self) -> None:
            self._loaded = load(["--config", str(link)], {})
            self._load = lambda: self._loaded

        async def reload(self, why: str) -> None:
            reloads.append(why)
            changed.set()

    watching = asyncio.ensure_future(Watched().watch())
    await asyncio.sleep(0.05)
    assert not reloads
    (tmp_path / "next").symlink_to(tmp_path / "two")
    (tmp_path / "next").rename(link)
    await asyncio.wait_for(changed.wait(), 10)
    watching.cancel()
    assert reloads == [f"file {link}"]


def test_a_server_that_is_drained_takes_no_requests_until_it_is_undrained(harness: RestHarness) -> None:
    client, metrics = harness.client, harness.context.metrics
    assert client.patch("/settings", json={"drain": True}).status_code == 200
    refused = client.post("/v1/completions", json={"prompt": "a b"})
    assert (refused.status_code, "the setting drain is on" in refused.text) == (503, True)
    assert client.get("/v2/health/ready").status_code == 503
    assert client.get("/v2/health/live").status_code == 200
    health = client.get("/health").json()
    assert (health["state"], health["cause"]) == ("draining", "the setting drain is on")
    assert metrics.value("engine_state", state="draining") == 1
    assert client.patch("/settings", json={"drain": False}).status_code == 200
    assert client.get("/v2/health/ready").status_code == 200
    assert client.post("/v1/completions", json={"prompt": "a b"}).status_code == 200
    assert metrics.value("engine_state", state="ready") == 1


def test_of_several_models_one_is_drained_by_itself() -> None:
    with SeveralHarness("a", "b", load_on_demand=True) as harness:
        client = harness.client
        harness.complete("a")
        assert client.patch("/settings?model=b", json={"drain": True}).status_code == 200
        assert harness.complete("b").status_code == 503
        assert harness.state("b") == "unloaded"  # a request that is refused loads nothing
        assert harness.complete("a").status_code == 200
        assert client.get("/v2/health/ready").status_code == 200
        assert client.post("/v2/repository/models/b/load").status_code == 200  # it may load, and waits for its requests
        assert client.get("/v2/models/b/ready").status_code == 503
        assert client.get("/v2/health/ready").status_code == 503  # for it must be there now
        assert client.get("/health").json()["state"] == "draining"
        assert client.patch("/settings", json={"drain": True}).status_code == 200
        assert harness.complete("a").status_code == 503
        assert client.patch("/settings", json={"drain": False}).status_code == 200
        assert (harness.complete("a").status_code, harness.complete("b").status_code) == (200, 200)
        assert client.get("/v2/health/ready").status_code == 200


def test_speculation_is_turned_off_and_on_again_as_it_was_at_the_start() -> None:
    given = {"method": "ngram", "num_speculative_tokens": 4}
    with RestHarness(speculative_config=given) as harness:
        for config, drafts in ((None, 0), ({**given, "num_speculative_tokens": 2}, 2), (None, 0), (given, 4)):
            answer = harness.client.patch("/settings", json={"speculative_config": config})
            assert (answer.status_code, harness.engine.settings["num_speculative_tokens"]) == (200, drafts), answer.text
        other = harness.client.patch("/settings", json={"speculative_config": {"method": "suffix"}})
        assert (other.status_code, "another method needs a restart" in other.text) == (400, True)
