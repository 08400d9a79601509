"""How requests end other than well: the client leaves, time runs out, the queue is full, the engine fails or is not there."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pagoda.engine.health import EngineState
from pagoda.errors import ConfigError, ErrorKind
from pagoda.serving import certificates
from pagoda.serving.http import event_stream
from pagoda.serving.http.connection_server import ConnectionServer
from tests.support.rest_harness import RestHarness
from tests.support.tls import write_self_signed_certificate
from tests.support.waiting import wait_until

INFER_BODY = {
    "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}],
    "parameters": {"max_tokens": 100},
}
GENERATE_BODY = {"text_input": "a", "parameters": {"max_tokens": 100}}
COMPLETION_BODY = {"prompt": ["a", "b"], "max_tokens": 100}
CHAT_BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 50, "n": 2}
# (path, body, sequences it asks for)
ROUTES: dict[str, tuple[str, dict[str, Any], int]] = {
    "infer": ("/v2/models/demo/infer", INFER_BODY, 2),
    "generate": ("/v2/models/demo/generate", GENERATE_BODY, 1),
    "generate_stream": ("/v2/models/demo/generate_stream", GENERATE_BODY, 1),
    "completions": ("/v1/completions", COMPLETION_BODY, 2),
    "completions stream": ("/v1/completions", {**COMPLETION_BODY, "stream": True}, 2),
    "chat": ("/v1/chat/completions", CHAT_BODY, 2),
    "chat stream": ("/openai/v1/chat/completions", {**CHAT_BODY, "stream": True}, 2),
}
STREAMS = [name for name in ROUTES if "stream" in name]
WHOLE = [name for name in ROUTES if "stream" not in name]


@pytest.fixture
def harness() -> Iterator[RestHarness]:
    with RestHarness() as running:
        yield running
        running.call(running.engine.hold.set)
        wait_until(lambda: running.engine.num_running == 0)
        wait_until(lambda: running.context.models.default.runner.num_running == 0)


@pytest.fixture
def starting() -> Iterator[RestHarness]:
    with RestHarness(is_ready=False) as running:
        yield running


def send(harness: RestHarness, route: str) -> socket.socket:
    """Send a request and read nothing of the answer."""
    path, body, _ = ROUTES[route]
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", harness.port), timeout=10)
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("route", ROUTES)
def test_a_client_that_leaves_while_its_request_waits_ends_it_in_the_engine(harness: RestHarness, route: str) -> None:
    harness.call(harness.engine.hold.clear)
    connection = send(harness, route)
    wait_until(lambda: harness.engine.num_running == ROUTES[route][2])
    connection.close()
    wait_until(lambda: len(harness.engine.aborted) == ROUTES[route][2])
    assert harness.engine.num_running == 0


@pytest.mark.parametrize("route", STREAMS)
def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_it_in_the_engine(harness: RestHarness, route: str) -> None:
    harness.engine.step_seconds = 0.02
    connection = send(harness, route)
    assert b"200 OK" in connection.recv(4096)
    connection.close()
    wait_until(lambda: len(harness.engine.aborted) == ROUTES[route][2])


@pytest.mark.parametrize("route", WHOLE)
def test_a_request_past_its_deadline_is_504_and_ends_in_the_engine(harness: RestHarness, route: str) -> None:
    path, body, num_sequences = ROUTES[route]
    harness.call(harness.engine.hold.clear)
    answer = harness.client.post(path, json=body, headers={"X-Request-Timeout-Seconds": "0.2"})
    assert answer.status_code == 504
    wait_until(lambda: len(harness.engine.aborted) == num_sequences)


@pytest.mark.parametrize("parameter", [{"timeout_seconds": 0.2}, {"timeout": 200_000}])
def test_a_deadline_may_come_as_a_parameter(harness: RestHarness, parameter: dict[str, Any]) -> None:
    harness.call(harness.engine.hold.clear)
    body = {"text_input": "a", "parameters": {"max_tokens": 100, **parameter}}
    assert harness.client.post("/v2/models/demo/generate", json=body).status_code == 504
    assert harness.client.post("/v2/models/demo/generate_stream", json=body).status_code == 504


def test_the_servers_own_limit_holds_for_every_request() -> None:
    with RestHarness(request_timeout_seconds=0.2) as harness:
        harness.call(harness.engine.hold.clear)
        body = {**GENERATE_BODY, "timeout_seconds": 60}
        assert harness.client.post("/v2/models/demo/generate", json=body).status_code == 504


def test_a_deadline_in_the_middle_of_a_stream_ends_it_with_an_error_event(harness: RestHarness) -> None:
    harness.engine.step_seconds = 0.02
    body = {"prompt": "a", "max_tokens": 100, "stream": True, "timeout_seconds": 0.3}
    lines = harness.client.post("/v1/completions", json=body).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert len(events) > 1
    assert events[-1]["error"]["code"] == "deadline_exceeded"
    wait_until(lambda: len(harness.engine.aborted) == 1)


@pytest.mark.parametrize("route", ROUTES)
def test_a_full_queue_is_429_with_the_time_to_come_back(harness: RestHarness, route: str) -> None:
    harness.engine.max_requests = 0
    answer = harness.client.post(ROUTES[route][0], json=ROUTES[route][1])
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "7"


def test_of_a_batch_that_does_not_fit_the_queue_as_a_whole_nothing_is_submitted(harness: RestHarness) -> None:
    harness.engine.max_requests = 1
    num_submitted = len(harness.engine.submitted)
    assert harness.client.post("/v1/completions", json=COMPLETION_BODY).status_code == 429
    assert len(harness.engine.submitted) == num_submitted


@pytest.mark.parametrize("route", STREAMS)
def test_a_fault_in_the_middle_of_a_stream_is_its_last_event(harness: RestHarness, route: str) -> None:
    harness.engine.fail_after = (3, ErrorKind.INTERNAL)
    path, body, _ = ROUTES[route]
    answer = harness.client.post(path, json=body)
    assert answer.status_code == 200
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert "[DONE]" not in events
    error = json.loads(events[-1])["error"]
    assert "failed as asked" in (error if isinstance(error, str) else error["message"])


@pytest.mark.parametrize("route", ROUTES)
def test_a_fault_of_ours_before_the_answer_is_a_500(harness: RestHarness, route: str) -> None:
    harness.engine.fail_after = (0, ErrorKind.INTERNAL)
    path, body, _ = ROUTES[route]
    assert harness.client.post(path, json=body).status_code == 500
    assert harness.client.get("/health").status_code == 200


def test_while_loading_ports_answer_with_the_stage(starting: RestHarness) -> None:
    client = starting.client
    health = client.get("/health")
    assert health.status_code == 503
    assert (health.json()["state"], health.json()["stage"]) == ("starting", "weights")
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/").json() == {"status": "alive"}
    assert client.get("/v2/health/ready").status_code == 503
    assert client.get("/v2/models/demo/ready").status_code == 503
    assert client.get("/v1/models").status_code == 503
    assert client.get("/v2/models/demo").status_code == 200
    assert client.post("/v2/repository/index").json()[0]["state"] == "LOADING"
    assert client.post("/v2/repository/models/demo/load").status_code == 503
    for path, body, _ in ROUTES.values():
        answer = client.post(path, json=body)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert "weights" in answer.text
    starting.run(starting.load)
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.post("/v2/models/demo/generate", json=GENERATE_BODY).status_code == 200


def test_while_draining_what_runs_goes_on_and_what_is_new_is_503(harness: RestHarness) -> None:
    harness.call(harness.engine.hold.clear)
    connection = send(harness, "generate")
    wait_until(lambda: harness.engine.num_running == 1)
    harness.call(harness.context.health.drain, "a test")
    assert harness.client.get("/v2/health/ready").status_code == 503
    assert harness.client.get("/v2/health/live").status_code == 200
    assert harness.client.get("/health").json()["state"] == "draining"
    assert harness.client.post("/v1/completions", json=COMPLETION_BODY).status_code == 503
    harness.call(harness.engine.hold.set)
    assert b"200 OK" in connection.recv(65536)
    connection.close()


def test_the_end_of_the_grace_period_ends_what_runs_with_a_retriable_error(harness: RestHarness) -> None:
    harness.call(harness.engine.hold.clear)
    connection = send(harness, "completions")
    wait_until(lambda: harness.engine.num_running == 2)
    harness.call(harness.context.models.default.runner.stop)
    answer = connection.recv(65536)
    assert b"503 Service Unavailable" in answer
    assert b"retry-after" in answer
    connection.close()
    assert len(harness.engine.aborted) == 2


def test_a_lost_engine_is_neither_ready_nor_live_and_its_requests_are_503(harness: RestHarness) -> None:
    harness.call(harness.engine.hold.clear)
    connection = send(harness, "generate")
    wait_until(lambda: harness.engine.num_running == 1)
    harness.call(harness.engine.health.transition, EngineState.DEAD, "killed by a test")
    harness.call(harness.engine.hold.set)
    assert b"503 Service Unavailable" in connection.recv(65536)
    connection.close()
    for path in ("/", "/health", "/v2/health/live", "/v2/health/ready", "/v2/models/demo/ready", "/v1/models"):
        assert harness.client.get(path).status_code == 503, path
    assert "killed by a test" in harness.client.get("/health").json()["cause"]
    for path, body, _ in ROUTES.values():
        assert harness.client.post(path, json=body).status_code == 503


def test_a_stream_that_waits_long_is_opened_and_kept_open_by_comments(
    harness: RestHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "OPEN_AFTER_SECONDS", 0.1)
    monkeypatch.setattr(event_stream, "COMMENT_EVERY_SECONDS", 0.1)
    harness.call(harness.engine.hold.clear)
    with harness.client.stream("POST", "/v1/completions", json={**COMPLETION_BODY, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(4)] == [": waiting for the first token", ""] * 2
        harness.call(harness.engine.hold.set)
        rest = [line for line in lines if line and not line.startswith(":")]
    assert rest[-1] == "data: [DONE]"


def test_api_keys_are_asked_for_where_they_protect_something() -> None:
    with RestHarness(api_keys=("first", "second")) as harness:
        public = ("/", "/health", "/v2/health/live", "/v2/health/ready", "/v2/models/demo/ready")
        for path in public:
            assert harness.client.get(path).status_code == 200, path
        for header in (
            {},
            {"Authorization": "Bearer third"},
            {"Authorization": "Basic first"},
            {"Authorization": "first"},
        ):
            for path, body, _ in ROUTES.values():
                answer = harness.client.post(path, json=body, headers=header)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
            for path in ("/v1/models", "/v2", "/v2/models/demo", "/version", "/metrics"):
                assert harness.client.get(path, headers=header).status_code == 401
        for key in ("first", "second"):
            headers = {"Authorization": f"Bearer {key}"}
            assert harness.client.get("/v1/models", headers=headers).status_code == 200


def test_idle_connections_do_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConnectionServer, "close_seconds", 1000)  # longer than the harness waits for the end
    with RestHarness() as harness, httpx.Client(base_url=harness.url) as idle:
        idle.get("/health")
        harness.run(harness.stop)


def test_errors_and_requests_are_counted(harness: RestHarness) -> None:
    harness.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})
    harness.client.post("/v1/completions", json={"prompt": 3})
    metrics = harness.client.get("/metrics").text
    assert 'pagoda_request_success_total{finished_reason="length",model_name="demo"} 1.0' in metrics
    assert 'pagoda_request_errors_total{kind="invalid_request",model_name="demo"} 1.0' in metrics
    assert 'pagoda_generation_tokens_total{model_name="demo"} 3.0' in metrics


def test_https_with_the_configured_certificate(tmp_path: Path) -> None:
    certificate, key = write_self_signed_certificate(tmp_path, "localhost")
    with RestHarness(ssl_certfile=str(certificate), ssl_keyfile=str(key)) as harness:
        assert harness.url.startswith("https://")
        assert harness.client.post("/v2/models/demo/generate", json=GENERATE_BODY).status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(harness.url.replace("https", "http") + "/health")


def test_a_certificate_that_cannot_be_read_is_a_configuration_error(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.pem")
    with pytest.raises(ConfigError, match="ssl_certfile"), RestHarness(ssl_certfile=missing, ssl_keyfile=missing):
        pass


def test_a_renewed_certificate_is_used_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(certificates, "CHECK_SECONDS", 0.02)
    certificate, key = write_self_signed_certificate(tmp_path, "localhost")
    with RestHarness(ssl_certfile=str(certificate), ssl_keyfile=str(key)) as harness:

        def shown() -> str:
            return ssl.get_server_certificate(("127.0.0.1", harness.port), timeout=10)

        first = shown()
        assert first == certificate.read_text()
        (tmp_path / "renewed").mkdir()
        renewed, its_key = write_self_signed_certificate(tmp_path / "renewed", "localhost")
        with caplog.at_level("WARNING"):
            certificate.write_text(renewed.read_text())  # which the old key does not fit
            wait_until(lambda: "cannot load the renewed certificate" in caplog.text)
        assert shown() == first
        key.write_text(its_key.read_text())
        wait_until(lambda: shown() == renewed.read_text())
        assert first != renewed.read_text()
