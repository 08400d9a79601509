"""`pagoda why`: each cause is found in a server that is brought into it, and a server that is well has none."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from pagoda.cli.top import run as top
from pagoda.cli.why import run, worst_lines
from pagoda.engine.health import EngineState
from pagoda.engine.messages import EngineStats
from pagoda.errors import CheckpointError, ConfigError, ErrorKind
from pagoda.monitoring.causes import Facts, find_causes, find_silence
from pagoda.monitoring.findings import Finding, Severity
from pagoda.monitoring.local import LocalFacts, Process
from pagoda.monitoring.server import Server, SilentError, look, look_closely
from pagoda.parallel.rank_health import RankHealth
from tests.support.ports import free_port
from tests.support.rest_harness import RestHarness
from tests.support.several_models import SeveralHarness
from tests.support.tls import write_self_signed_certificate

IDLE = LocalFacts(cores=4)


@pytest.fixture(scope="module")
def rest() -> Iterator[RestHarness]:
    with RestHarness(max_num_waiting=8, enable_lora=True, max_loras=1) as running:
        yield running


def causes(rest: RestHarness, between: Callable[[], None] = lambda: None, **facts: Any) -> dict[str, Finding]:
    """What is found, by its code, with `between` done between the two looks."""
    server = Server(rest.url)
    then = look(server)
    between()
    return {
        one.code: one for one in find_causes(Facts(now=look_closely(server), then=then, **{"local": IDLE, **facts}))
    }


@pytest.fixture
def stats(rest: RestHarness) -> Iterator[Callable[..., None]]:
    def set_stats(**values: Any) -> None:
        rest.engine.stats = EngineStats(**{"num_blocks": 100, **values})

    yield set_stats
    rest.engine.stats, rest.engine.ranks = EngineStats(), []


def test_a_server_that_is_well_has_no_cause(rest: RestHarness, capsys: pytest.CaptureFixture[str]) -> None:
    rest.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
    assert causes(rest) == {}
    assert run(["--base-url", rest.url, "--seconds", "0"]) in (0, 1)  # 1: this machine may be busy
    assert capsys.readouterr().out.startswith(f"{rest.url}: ready")


@pytest.mark.parametrize(
    ("values", "code", "severity"),
    [
        ({"num_running": 4, "num_waiting": 8}, "queue-full", Severity.ERROR),
        ({"num_running": 16, "num_waiting": 3}, "slots-full", Severity.WARNING),
        ({"num_running": 2, "num_waiting": 5}, "queue-grows", Severity.WARNING),
        ({"num_running": 4, "num_waiting": 1, "num_blocks_in_use": 97}, "kv-full", Severity.WARNING),
        (
            {"num_running": 1, "num_waiting": 1, "running_adapters": ["a"], "waiting_adapters": ["b"]},
            "adapters-wait",
            Severity.WARNING,
        ),
        (
            {"prefix_cache_queries": 5000, "prefix_cache_hits": 500, "prefix_cache_misses": {"evicted": 4000}},
            "cache-evicted",
            Severity.NOTE,
        ),
    ],
)
def test_load(
    rest: RestHarness, stats: Callable[..., None], values: dict[str, Any], code: str, severity: Severity
) -> None:
    stats(**values)
    found = causes(rest)
    assert {name: one.severity for name, one in found.items()} == {code: severity}
    assert found[code].seen
    assert found[code].advice


def test_preemptions_and_drafts_are_of_the_time_between_two_looks(
    rest: RestHarness, stats: Callable[..., None]
) -> None:
    before = {
        "num_preemptions": 5,
        "num_spec_drafts": 100,
        "num_spec_draft_tokens": 300,
        "num_spec_accepted_tokens": 290,
    }
    stats(**before, num_spec_accepted_tokens_per_pos=[90])
    assert causes(rest) == {}
    after = {
        "num_preemptions": 9,
        "num_spec_drafts": 200,
        "num_spec_draft_tokens": 600,
        "num_spec_accepted_tokens": 300,
    }
    found = causes(rest, lambda: stats(**after, num_spec_accepted_tokens_per_pos=[95]))
    assert set(found) == {"preempting", "drafts-refused"}
    assert "3% of the draft tokens" in found["drafts-refused"].seen[0]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ErrorKind.RATE_LIMITED, "quota"),
        (ErrorKind.UNAUTHENTICATED, "keys"),
        (ErrorKind.PERMISSION_DENIED, "scopes"),
        (ErrorKind.INTERNAL, "internal"),
        (ErrorKind.ENGINE_DEAD, "engine-failed"),
    ],
)
def test_errors_that_clients_get(rest: RestHarness, kind: ErrorKind, code: str) -> None:
    assert set(causes(rest, lambda: rest.context.metrics.count_error(kind))) == {code}


def test_requests_that_run_out_of_time(rest: RestHarness) -> None:
    assert set(causes(rest, lambda: rest.context.metrics.request_aborts["deadline"].inc(3))) == {"deadlines"}


def test_ranks(rest: RestHarness, stats: Callable[..., None]) -> None:
    now = time.monotonic()
    rest.engine.ranks = [
        RankHealth(rank=0, host="a", pid=1, last_heartbeat=now, num_steps=3),
        RankHealth(rank=1, host="b", pid=2, last_heartbeat=now - 60, num_steps=3),
        RankHealth(rank=2, host="b", pid=3, last_heartbeat=now, num_steps=3, is_up=False),
    ]
    lossy = LocalFacts(cores=4, interfaces_down=["eth1"], interface_errors={"eth0": 7})
    found = causes(rest, local=lossy)
    assert set(found) == {"rank-silent", "rank-down", "network"}
    assert found["rank-silent"].subject == "rank 1 of demo"
    assert "network interface" in found["rank-silent"].advice
    assert found["network"].seen == ("eth0: 7 packets lost or wrong", "eth1 is down")


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({"answer_seconds": 3.0}, "slow-answer"),
        ({"local": LocalFacts(cores=2, load=9.0)}, "machine-busy"),
        ({"local": LocalFacts(memory_limit=2**30, memory_left=2**20)}, "memory-short"),
        ({"local": LocalFacts(processes=[Process(pid=7, role="engine core", status="stopped")])}, "process-stopped"),
    ],
)
def test_the_machine(rest: RestHarness, facts: dict[str, Any], code: str) -> None:
    assert set(causes(rest, **facts)) == {code}


def test_states_with_their_causes() -> None:
    with RestHarness(is_ready=False) as rest:
        found = causes(rest)["starting"]
        assert "at the stage weights: it reads the weights" in found.what
        rest.run(rest.load)
        assert causes(rest) == {}
        health = rest.engine.health
        rest.call(health.transition, EngineState.DEGRADED, "out of memory in a step of 512 tokens")
        assert "kv_cache_memory_bytes" in causes(rest)["degraded"].advice
        for number in range(3):
            rest.call(health.transition, EngineState.STARTING, f"the engine core was killed by SIGKILL ({number})")
            rest.call(health.transition, EngineState.READY, "the engine core has started")
        found = causes(rest)["restarts"]
        assert found.severity is Severity.WARNING
        assert len(found.seen) == 3
        rest.call(health.transition, EngineState.STARTING, "the engine core was killed by SIGKILL")
        rest.call(health.enter_phase, "restart", "attempt 2 of 5, in 3 s")
        again = causes(rest)["restarting"]
        assert "killed by SIGKILL; it is starting, at the stage restart (attempt 2 of 5, in 3 s)" in again.what
        rest.call(health.transition, EngineState.READY, "the engine core has started")
        rest.call(rest.context.health.drain, "the server received a stop signal")
        assert "stop signal" in causes(rest)["draining"].what
        rest.call(health.transition, EngineState.DEAD, "config.json is missing in the checkpoint")
        assert "pagoda models inspect" in causes(rest)["dead"].advice


def test_a_model_that_sleeps_or_is_not_loaded() -> None:
    with RestHarness(wake_on_request=False) as rest:
        rest.call(rest.engine.health.transition, EngineState.SLEEPING, "level 1")
        assert causes(rest)["sleeping"].severity is Severity.ERROR
        rest.call(rest.engine.health.unload, "asked for")
        assert causes(rest)["unloaded"].severity is Severity.NOTE


def test_a_key_without_the_scope_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RestHarness(api_keys=("k",)) as rest:
        for key, why in (("wrong", "key"), ("k", "read")):
            assert run(["--base-url", rest.url, "--api-key", key, "--seconds", "0", "--json"]) == 1
            report = json.loads(capsys.readouterr().out)
            (found,) = (one for one in report["findings"] if one["code"] == "key-refused")
            assert why in " ".join(found["seen"])
            assert report["state"] == "ready"


def test_nothing_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "server.log"
    log.write_text("2026 INFO fine\n2026 ERROR pagoda: the checkpoint has no config.json\n2026 INFO over\n")
    refused = f"http://127.0.0.1:{free_port()}"
    assert run(["--base-url", refused, "--log", str(log)]) == 1
    out = capsys.readouterr().out
    assert "connection refused: nothing listens there" in out
    assert "log: 2026 ERROR pagoda: the checkpoint has no config.json" in out
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = Server(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)
        with pytest.raises(SilentError) as caught:
            look(server)
    assert caught.value.what == "timeout"
    stopped = LocalFacts(processes=[Process(pid=5, role="server", status="stopped", ports=(8080,))], oom_kills=2)
    codes = [one.code for one in find_silence(caught.value, stopped)]
    assert codes == ["process-stopped", "oom-killed", "no-answer-timeout"]
    elsewhere = LocalFacts(processes=[Process(pid=5, role="server", status="sleeping", ports=(9000, 9001))])
    found = find_silence(SilentError("refused", "refused"), elsewhere)
    assert found[0].seen == ("pid 5 listens on 9000, 9001",)
    assert find_silence(SilentError("refused", "refused"), IDLE)[0].code == "no-process"
    ending = find_silence(SilentError("refused", "refused"), elsewhere, url="http://localhost:9001")
    assert [one.code for one in ending] == ["no-answer-refused"]  # the one that was asked
    with pytest.raises(SilentError) as caught:
        look(Server("http://no-such-host.invalid:1"))
    assert caught.value.what == "name"
    with pytest.raises(ConfigError, match="cannot be read"):
        run(["--log", str(tmp_path / "none")])


def test_the_scheme_is_the_wrong_one(tmp_path: Path) -> None:
    certificate, key = write_self_signed_certificate(tmp_path, "somewhere.example")
    with RestHarness(ssl_certfile=str(certificate), ssl_keyfile=str(key)) as rest:
        for url in (rest.url, rest.url.replace("https", "http")):
            with pytest.raises(SilentError) as caught:
                look(Server(url))
            assert caught.value.what in ("tls", "reset", "http")


def test_another_server_is_no_pagoda(capsys: pytest.CaptureFixture[str]) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as other:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        assert run(["--base-url", f"http://127.0.0.1:{other.server_port}"]) == 1
        thread.join(5)
    assert "another server listens there" in capsys.readouterr().out


def test_a_model_by_its_name(rest: RestHarness) -> None:
    with pytest.raises(ConfigError, match="no such model; did you mean demo"):
        run(["dem", "--base-url", rest.url, "--seconds", "0"])


def test_the_worst_lines_of_a_log() -> None:
    assert worst_lines(["a", "b"]) == ["a", "b"]
    assert worst_lines(["a", '{"level": "error", "message": "x"}', "b"]) == ['{"level": "error", "message": "x"}']
    assert all(replace(one, seen=()).as_lines() for one in find_silence(SilentError("tls", "x"), None))


def test_each_of_several_models_has_its_own_cause(capsys: pytest.CaptureFixture[str]) -> None:
    with SeveralHarness("a", "b", "c", load_on_demand=True, load_models=("a",)) as harness:
        harness.engines["b"].load_error = CheckpointError("model.safetensors is cut short")
        answer = harness.client.post("/v2/repository/models/b/load", json={})
        assert answer.status_code >= 400
        found = {(one.code, one.subject): one for one in _found(harness.url)}
        assert ("dead", "model b") in found
        dead = found["dead", "model b"]
        assert "model.safetensors is cut short" in dead.what
        assert dead.severity is Severity.ERROR  # it was asked for
        assert found["unloaded", "model c"].severity is Severity.NOTE
        assert not [subject for _, subject in found if subject == "model a"]
        assert run(["b", "--base-url", harness.url, "--seconds", "0"]) == 1
        out = capsys.readouterr().out
        assert "model b" in out
        assert "model c" not in out
        assert top(["--once", "--interval", "0.1", "--base-url", harness.url]) == 1
        shown = capsys.readouterr().out
        assert all(line in shown for line in ("a  ready", "b  dead", "c  unloaded"))


def _found(url: str) -> list[Finding]:
    server = Server(url)
    return find_causes(Facts(now=look_closely(server), then=look(server), local=IDLE))
