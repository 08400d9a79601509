"""Who may call what: every route and RPC declares it, denies by default, and administrators' calls are on record."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import httpx
import pytest
from fastapi import APIRouter
from fastapi.routing import iter_route_contexts
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from pagoda.serving.app import create_app
from pagoda.serving.auth.routes import METHODS, ROUTES, RouteAccess
from pagoda.serving.auth.scopes import Scope
from pagoda.serving.grpc.messages import POOL
from tests.support.grpc_harness import GrpcHarness, infer_request
from tests.support.rest_harness import RestHarness
from tests.support.waiting import wait_until

KEYS = {scope: f"the-key-with-{scope}" for scope in Scope}
NAMES = {scope: f"name-of-{scope}" for scope in Scope}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    path.write_text(json.dumps([{"name": NAMES[scope], "key": KEYS[scope], "scopes": [scope]} for scope in Scope]))
    return path


@pytest.fixture(scope="module")
def rest(key_file: Path) -> Iterator[RestHarness]:
    with RestHarness(api_keys_file=str(key_file), enable_tokenizer_info_endpoint=True) as running:
        yield running


@pytest.fixture(scope="module")
def rpc(key_file: Path) -> Iterator[GrpcHarness]:
    with GrpcHarness(api_keys_file=str(key_file)) as running:
        yield running


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


def served_routes(rest: RestHarness) -> set[str]:
    """Method and path of everything that the application routes."""
    app = create_app(rest.context, rest.service, rest.settings)
    return {f"{method} {route.path}" for route in iter_route_contexts(app.routes) for method in route.methods or ("?",)}


def test_every_route_declares_its_access_and_every_declaration_is_a_route(rest: RestHarness) -> None:
    served = {route for route in served_routes(rest) if not route.startswith("HEAD ")}
    assert sorted(served - ROUTES.keys()) == []
    assert sorted(ROUTES.keys() - served) == []


def test_every_rpc_declares_its_access_and_every_declaration_is_an_rpc(rpc: GrpcHarness) -> None:
    served = {f"/{service}/{method.name}" for service, method in rpc_methods(rpc)}
    assert sorted(served - METHODS.keys()) == []
    assert sorted(METHODS.keys() - served) == []


def rpc_methods(rpc: GrpcHarness) -> Iterator[tuple[str, object]]:
    """Every method of every service that the server says it has."""
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    services = ProtoReflectionDescriptorDatabase(rpc.channel).get_services()
    assert len(services) >= 3
    for service in services:
        for method in POOL.FindServiceByName(service).methods:
            yield service, method


def test_a_route_without_a_declaration_ends_the_start() -> None:
    router = APIRouter()
    router.add_api_route("/new", lambda: None, methods=["GET"])
    with pytest.raises(LookupError, match=r"GET /new"):
        RouteAccess(router.routes, {})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nothing"),
        ("POST", "/metrics"),
        ("DELETE", "/health"),
        ("GET", "/metrics/"),
        ("GET", "/v2/health/ready/"),
        ("GET", "/v1/"),
        ("OPTIONS", "/v1/models"),
    ],
)
def test_what_is_not_declared_needs_a_key(rest: RestHarness, method: str, path: str) -> None:
    assert rest.client.request(method, path).status_code == 401
    assert rest.client.request(method, path, headers=bearer("unknown-key")).status_code == 401
    assert rest.client.request(method, path, headers=bearer(KEYS[Scope.READ])).status_code in (404, 405)


@pytest.mark.parametrize("route", sorted(ROUTES))
def test_a_route_lets_in_the_keys_that_it_declares_and_no_others(rest: RestHarness, route: str) -> None:
    method, path = route.split(" ")
    path = path.replace("{model_name:model}", "demo").replace("{model_version}", "1")
    access = ROUTES[route]
    for scope, key in (*KEYS.items(), (None, None)):
        with rest.client.stream(method, path, headers=bearer(key)) as answer:  # some do not end by themselves
            status = answer.status_code
        if access.admits({scope} if scope else frozenset()):
            assert status not in (401, 403), (scope, status)
        else:
            assert status == (401 if key is None else 403), (scope, status)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_rpc_lets_in_the_keys_that_it_declares_and_no_others(rpc: GrpcHarness, name: str) -> None:
    service, method = name[1:].split("/")
    pool: DescriptorPool = POOL
    request = GetMessageClass(pool.FindServiceByName(service).methods_by_name[method].input_type)()
    is_stream = method in ("ModelStreamInfer", "ServerReflectionInfo")
    call = (rpc.channel.stream_stream if is_stream else rpc.channel.unary_unary)(
        name, request_serializer=lambda message: message.SerializeToString(), response_deserializer=lambda raw: raw
    )
    if method == "Watch":
        call = rpc.channel.unary_stream(
            name, request_serializer=lambda message: message.SerializeToString(), response_deserializer=lambda raw: raw
        )
    for scope, key in (*KEYS.items(), (None, None)):
        code = grpc.StatusCode.OK
        try:
            answers = call(iter([request]) if is_stream else request, metadata=tuple(bearer(key).items()), timeout=10)
            if is_stream:
                list(answers)
            elif method == "Watch":
                next(answers)
                answers.cancel()
        except grpc.RpcError as error:
            code = error.code()
        admitted = METHODS[name].admits({scope} if scope else frozenset())
        refused = grpc.StatusCode.UNAUTHENTICATED if key is None else grpc.StatusCode.PERMISSION_DENIED
        assert (code is refused) is not admitted, (scope, code)


def test_health_shows_details_to_those_who_may_read(rest: RestHarness) -> None:
    public = rest.client.get("/health").json()
    assert public == {"state": "ready", "started": True, "stage": "ready"}
    assert rest.client.get("/health", headers=bearer("unknown-key")).json() == public
    assert rest.client.get("/health", headers=bearer(KEYS[Scope.INFER])).json() == public
    details = rest.client.get("/health", headers=bearer(KEYS[Scope.READ])).json()
    assert details.keys() >= {"running", "waiting", "cause", "ranks", *public}


def test_anthropics_header_is_a_key_too(rest: RestHarness) -> None:
    assert rest.client.get("/v1/models", headers={"x-api-key": KEYS[Scope.INFER]}).status_code == 200
    assert rest.client.get("/v1/models", headers={"x-api-key": "unknown-key"}).status_code == 401


def audited(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "pagoda.audit"]


def test_every_call_of_an_administrator_is_on_record(rest: RestHarness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pagoda.audit")
    load, unload = (f"/v2/repository/models/demo/{action}" for action in ("load", "unload"))
    rest.client.post(load, headers=bearer(KEYS[Scope.ADMIN]))
    rest.client.post(unload, headers=bearer(KEYS[Scope.ADMIN]))
    rest.client.post(load, headers=bearer(KEYS[Scope.INFER]))
    rest.client.post(load, headers=bearer("unknown-key"))
    rest.client.get("/v1/models", headers=bearer(KEYS[Scope.INFER]))
    wait_until(lambda: len(audited(caplog)) >= 4, "audit lines")
    assert audited(caplog) == [
        f"POST {load} by name-of-admin from 127.0.0.1: 200",
        f"POST {unload} by name-of-admin from 127.0.0.1: 400",
        f"POST {load} by name-of-infer from 127.0.0.1: 403",
        f"POST {load} by anonymous from 127.0.0.1: 401",
    ]
    assert not any(key in caplog.text for key in KEYS.values())


def test_so_is_every_call_over_grpc(rpc: GrpcHarness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pagoda.audit")
    for scope in (Scope.ADMIN, Scope.READ):
        request = GetMessageClass(POOL.FindMessageTypeByName("inference.RepositoryModelLoadRequest"))(model_name="demo")
        with suppress(grpc.RpcError):
            rpc.stub("RepositoryModelLoad")(request, metadata=tuple(bearer(KEYS[scope]).items()), timeout=10)
    wait_until(lambda: len(audited(caplog)) >= 2, "audit lines")
    assert audited(caplog) == [
        "RepositoryModelLoad by name-of-admin from 127.0.0.1: OK",
        "RepositoryModelLoad by name-of-read from 127.0.0.1: PERMISSION_DENIED",
    ]


def test_an_open_server_has_no_bounds_and_a_wrong_key_is_no_matter() -> None:
    with RestHarness() as harness:
        for key in (None, "whatever"):
            assert harness.client.get("/metrics", headers=bearer(key)).status_code == 200
            assert "running" in harness.client.get("/health", headers=bearer(key)).json()


def test_keys_that_change_are_in_force_on_open_connections_and_the_metrics_tell(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([{"key": "first-key"}, {"key": "reader-key", "scopes": ["read"]}]))
    with RestHarness(api_keys_file=str(file)) as harness:
        reload = harness.context.keys.reload

        def status(key: str) -> int:
            return harness.client.get("/v1/models", headers=bearer(key)).status_code

        def metric(name: str) -> float:
            lines = harness.client.get("/metrics", headers=bearer("reader-key")).text.splitlines()
            return float(next(line for line in lines if line.startswith(f"pagoda_{name}{{")).split()[-1])

        assert (status("first-key"), status("second-key")) == (200, 401)
        assert (metric("api_keys"), metric("api_keys_last_reload_successful")) == (2, 1)
        file.write_text(json.dumps([{"key": "second-key"}, {"key": "reader-key", "scopes": ["read"]}]))
        reload()
        assert (status("first-key"), status("second-key")) == (401, 200)
        file.write_text("")
        reload()
        assert (status("first-key"), status("second-key")) == (401, 200)
        assert metric("api_keys_last_reload_successful") == 0


def test_a_stream_of_requests_ends_with_its_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first-key")
    with GrpcHarness(api_keys_file=str(file)) as harness:

        def requests() -> Iterator[object]:
            yield infer_request("a")
            file.write_text("second-key")
            harness.keys.reload()
            yield infer_request("b")

        stream = harness.stub("ModelStreamInfer")(requests(), metadata=tuple(bearer("first-key").items()), timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_guesses_are_slowed_down_while_a_good_key_of_the_same_peer_is_not(key_file: Path) -> None:
    with RestHarness(api_keys_file=str(key_file), enable_tokenizer_info_endpoint=True) as harness:
        slept: list[float] = []

        async def sleep(seconds: float) -> None:
            slept.append(seconds)

        harness.context.keys._sleep = sleep
        answers = [harness.client.get("/v1/models", headers=bearer(f"guess-{index}")) for index in range(30)]
        assert {answer.status_code for answer in answers} == {401, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert max(slept) > 1
        num_slept = len(slept)
        good: httpx.Response = harness.client.get("/v1/models", headers=bearer(KEYS[Scope.INFER]))
        assert good.status_code == 200
        assert len(slept) == num_slept


def test_a_public_probe_of_another_model_does_not_say_which_one_is_served(rest: RestHarness, key_file: Path) -> None:
    path = "/v2/models/guess/ready"
    answer = rest.client.get(path)
    assert (answer.status_code, answer.json()["error"]) == (404, "model 'guess' is not served here")
    known = rest.client.get(path, headers={"Authorization": f"Bearer {KEYS[Scope.INFER]}"})
    assert known.json()["error"] == "model 'guess' is not served here; the served model is 'demo'"
    with GrpcHarness(api_keys_file=str(key_file)) as harness, pytest.raises(grpc.RpcError) as caught:
        harness.stub("ModelReady")(GetMessageClass(POOL.FindMessageTypeByName("inference.ModelReadyRequest"))(name="x"))
    assert caught.value.details() == "model 'x' is not served here"  # type: ignore[attr-defined]
