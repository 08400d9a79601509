"""API keys share the engine: every door tells it whose request it is, and nobody can tell which key that was."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from pagoda.scheduling.prefix_hash import root_hash
from tests.support.grpc_harness import GrpcHarness, infer_request
from tests.support.rest_harness import RestHarness

KEYS = ("first-secret-key", "second-secret-key")
INFER = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
ROUTES = {
    "/v2/models/demo/infer": {**INFER, "parameters": {"max_tokens": 2}},
    "/v2/models/demo/generate": {"text_input": "a", "max_tokens": 2},
    "/v2/models/demo/generate_stream": {"text_input": "a", "max_tokens": 2},
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 2, "n": 2},
    "/v1/chat/completions": {**CHAT, "max_tokens": 2, "stream": True},
    "/v1/responses": {"input": "a", "max_output_tokens": 16},
    "/v1/messages": {**CHAT, "model": "demo", "max_tokens": 2},
    "/api/generate": {"model": "demo", "prompt": "a", "options": {"num_predict": 2}},
    "/api/chat": {**CHAT, "model": "demo", "options": {"num_predict": 2}},
    "/generate": {"inputs": "a", "parameters": {"max_new_tokens": 2}},
    "/generate_stream": {"inputs": "a", "parameters": {"max_new_tokens": 2}},
    "/invocations": {"prompt": "a", "max_tokens": 2},
}


@pytest.fixture(scope="module")
def rest() -> Iterator[RestHarness]:
    with RestHarness(api_keys=KEYS) as running:
        yield running


def tenants_of(harness: RestHarness, path: str, key: str | None) -> set[str]:
    """Whose requests reached the engine."""
    harness.engine.submitted.clear()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    assert harness.client.post(path, json=ROUTES[path], headers=headers).status_code == 200
    return {request.tenant for request in harness.engine.submitted}


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_tells_the_engine_whose_request_it_is(rest: RestHarness, path: str) -> None:
    (first,) = tenants_of(rest, path, KEYS[0])
    (second,) = tenants_of(rest, path, KEYS[1])
    assert first != second
    assert tenants_of(rest, path, KEYS[0]) == {first}  # on the same connection
    assert not any(key[:5] in tenant for key in KEYS for tenant in (first, second))


def test_a_server_without_keys_has_no_tenants() -> None:
    with RestHarness() as harness:
        assert tenants_of(harness, "/v1/completions", None) == {""}


def test_an_only_key_is_the_tenant_that_it_will_be_beside_others(rest: RestHarness) -> None:
    """Keys come and go while the server runs: what is cached for one of them must be nobody else's afterwards."""
    with RestHarness(api_keys=KEYS[:1]) as harness:
        alone = tenants_of(harness, "/v1/completions", KEYS[0])
    assert alone == tenants_of(rest, "/v1/completions", KEYS[0])


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_puts_the_tenant_into_the_root_of_the_prefix_hash(rest: RestHarness, path: str) -> None:
    for key in KEYS:
        (tenant,) = tenants_of(rest, path, key)
        assert {request.cache_keys for request in rest.engine.submitted} == {(f"tenant={tenant}",)}


def test_a_salt_divides_a_tenants_own_cache_and_does_not_reach_anothers(rest: RestHarness) -> None:
    roots = set()
    for key in KEYS:
        for salt in ("a", "b", f"tenant={tenants_of(rest, '/v1/completions', KEYS[0]).pop()}"):
            rest.engine.submitted.clear()
            body = {"prompt": "a", "max_tokens": 1, "cache_salt": salt}
            answer = rest.client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200
            roots.add(root_hash(rest.engine.submitted[0].cache_keys))
    assert len(roots) == 6


def test_grpc_tells_the_same_names_as_rest(rest: RestHarness) -> None:
    with GrpcHarness(api_keys=KEYS) as harness:
        for key in (*KEYS, *KEYS):
            metadata = (("authorization", f"Bearer {key}"),)
            harness.infer(infer_request("a"), metadata=metadata)
            requests = iter([infer_request("a"), infer_request("b")])
            assert list(harness.stub("ModelStreamInfer")(requests, metadata=metadata, timeout=20))
        with pytest.raises(grpc.RpcError):
            harness.infer(infer_request("a"))
        names = [tenants_of(rest, "/v1/completions", key).pop() for key in KEYS]
        assert harness.generator.tenants == [name for name in (*names, *names) for _ in range(3)]
