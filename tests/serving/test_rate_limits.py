"""Limits of an API key, as its clients meet them over REST and gRPC."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest

from tests.support.grpc_harness import GrpcHarness, infer_request
from tests.support.rest_harness import RestHarness


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    file = tmp_path / "keys.json"
    file.write_text(
        json.dumps(
            [
                {
                    "name": "small",
                    "key": "small-key",
                    "requests_per_minute": 2,
                    "tokens_per_minute": 1000,
                    "weight": 0.5,
                },
                {"name": "free", "key": "free-key"},
            ]
        )
    )
    return str(file)


def test_rest_answers_429_as_openai_does(key_file: str) -> None:
    with RestHarness(api_keys_file=key_file) as harness:

        def post(key: str, path: str = "/v1/completions", **body: object):
            body = {"prompt": ["a", "b"], "max_tokens": 2, **body}
            return harness.client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})

        first = post("small-key")  # of two prompts, and one request all the same
        assert first.status_code == 200
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert {request.tenant_weight for request in harness.engine.submitted} == {0.5}
        used = first.json()["usage"]["total_tokens"]
        second = post("small-key", stream=True)
        assert second.status_code == 200
        assert abs(int(second.headers["x-ratelimit-remaining-tokens"]) - (1000 - used)) <= used
        third = post("small-key")
        assert third.status_code == 429
        error = third.json()["error"]
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
        assert 1 <= int(third.headers["retry-after"]) <= 30
        assert third.headers["x-ratelimit-remaining-requests"] == "0"
        headers = {"Authorization": "Bearer small-key"}
        assert harness.client.get("/v1/models", headers=headers).status_code == 200
        free = post("free-key")
        assert free.status_code == 200
        assert not [name for name in free.headers if name.startswith("x-ratelimit")]


def test_grpc_answers_resource_exhausted(key_file: str) -> None:
    with GrpcHarness(api_keys_file=key_file) as harness:
        metadata = (("authorization", "Bearer small-key"),)
        harness.infer(infer_request("a"), metadata=metadata)
        harness.infer(infer_request("a"), metadata=metadata)
        with pytest.raises(grpc.RpcError) as caught:
            harness.infer(infer_request("a"), metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "Rate limit reached for requests per minute" in caught.value.details()
        assert 1 <= int(dict(caught.value.trailing_metadata())["retry-after"]) <= 30
