"""Headers that llm-d's gateway passes on: what each of them does, over REST and gRPC."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from tests.support.grpc_harness import GrpcHarness, infer_request
from tests.support.rest_harness import RestHarness

SETTINGS = {"scheduling_policy": "priority", "inference_objectives": {"chat": 10}, "model_aliases": ("other/name",)}
HEADERS = {
    "x-llm-d-inference-fairness-id": "team",
    "x-llm-d-inference-objective": "chat",
    "x-llm-d-slo-ttft-ms": "60000",
    "x-llm-d-slo-tpot-ms": "60000",
}
BODIES = {
    "/v1/completions": {"prompt": "a", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True},
    "/v2/models/demo/generate": {"text_input": "a", "max_tokens": 3},
}


@pytest.fixture(scope="module")
def rest() -> Iterator[RestHarness]:
    with RestHarness(**SETTINGS) as running:
        yield running


@pytest.mark.parametrize("path", BODIES)
def test_flow_priority_and_due_time_reach_the_engine(rest: RestHarness, path: str) -> None:
    rest.engine.submitted.clear()
    assert rest.client.post(path, json=BODIES[path], headers=HEADERS).status_code == 200
    (request,) = rest.engine.submitted
    assert (request.fairness_id, request.priority, request.ttft_slo) == ("team", -10, 60.0)
    assert request.cache_keys == ()  # one key, one cache: a flow is no tenant
    assert rest.client.post(path, json=BODIES[path]).status_code == 200  # on the same connection
    assert (rest.engine.submitted[-1].fairness_id, rest.engine.submitted[-1].priority) == ("", 0)


def test_a_priority_of_the_body_counts_more(rest: RestHarness) -> None:
    rest.engine.submitted.clear()
    body = {**BODIES["/v1/completions"], "priority": 4}
    assert rest.client.post("/v1/completions", json=body, headers=HEADERS).status_code == 200
    assert rest.engine.submitted[0].priority == 4


def test_the_model_is_the_one_that_the_gateway_has_rewritten_it_to(rest: RestHarness) -> None:
    body = {**BODIES["/v1/completions"], "model": "what-the-client-said"}
    assert rest.client.post("/v1/completions", json=body).status_code == 404
    for name in ("demo", "other/name"):
        answer = rest.client.post("/v1/completions", json=body, headers={"x-llm-d-model-name-rewrite": name})
        assert answer.status_code == 200
    answer = rest.client.post("/v1/completions", json=body, headers={"x-llm-d-model-name-rewrite": "elsewhere"})
    assert answer.status_code == 404
    assert "elsewhere" in answer.json()["error"]["message"]


def test_a_header_that_cannot_be_is_a_400_that_names_it(rest: RestHarness) -> None:
    answer = rest.client.post("/v1/completions", json=BODIES["/v1/completions"], headers={"x-slo-ttft-ms": "soon"})
    assert answer.status_code == 400
    assert "x-slo-ttft-ms must be a whole number" in answer.json()["error"]["message"]
    assert rest.client.get("/health", headers={"x-slo-ttft-ms": "soon"}).status_code == 200


def test_slos_that_were_kept_and_missed_are_counted() -> None:
    with RestHarness(**SETTINGS) as rest:
        metrics = rest.context.metrics
        rest.client.post("/v1/completions", json=BODIES["/v1/completions"], headers=HEADERS)
        rest.client.post("/v1/completions", json=BODIES["/v1/completions"])
        for slo in ("ttft", "tpot"):
            assert metrics.value("request_slo_met_total", slo=slo) == 1
            assert metrics.value("request_slo_missed_total", slo=slo) == 0


def test_grpc_reads_the_same_names_in_metadata() -> None:
    with GrpcHarness(**SETTINGS) as harness:
        harness.infer(infer_request("a"), metadata=tuple(HEADERS.items()))
        with pytest.raises(grpc.RpcError) as caught:
            harness.infer(infer_request("a"), metadata=(("x-llm-d-slo-ttft-ms", "soon"),))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
