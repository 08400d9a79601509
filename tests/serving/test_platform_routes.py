"""Routes that platforms and people who come from vLLM call, and pages of other origins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.rest_harness import RestHarness

ORIGIN = "https://app.example.com"
KEY = {"authorization": "Bearer s3cret"}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestHarness]:
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps([{"name": "all", "key": "s3cret", "scopes": ["infer", "read", "admin"]}]))
    with RestHarness(
        api_keys=("only-infer",),
        api_keys_file=str(keys),
        enable_tokenizer_info_endpoint=True,
        allowed_origins=(ORIGIN,),
        allowed_methods=("GET", "POST"),
        allow_credentials=True,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def plain() -> Iterator[RestHarness]:
    with RestHarness(disable_fastapi_docs=True) as running:
        yield running


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_ping_is_readiness_without_a_key(harness: RestHarness, method: str) -> None:
    answer = harness.client.request(method, "/ping")
    assert (answer.status_code, answer.content) == (200, b"")


def test_ping_says_503_while_the_model_loads() -> None:
    with RestHarness(is_ready=False) as loading:
        assert loading.client.get("/ping").status_code == 503
        assert loading.client.post("/reset_prefix_cache").status_code == 503


def test_load_counts_what_is_in_the_engine(harness: RestHarness) -> None:
    assert harness.client.get("/load", headers=KEY).json() == {"server_load": 0}
    assert harness.client.get("/load").status_code == 401


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/load"), ("GET", "/server_info"), ("POST", "/reset_prefix_cache")]
)
def test_a_key_that_may_only_infer_may_not_look_or_reset(harness: RestHarness, method: str, path: str) -> None:
    answer = harness.client.request(method, path, headers={"authorization": "Bearer only-infer"})
    assert answer.status_code == 403


def test_server_info_has_every_setting_but_secrets(harness: RestHarness) -> None:
    answer = harness.client.get("/server_info", headers=KEY)
    assert answer.json()["config"]["allowed_origins"] == [ORIGIN]
    assert answer.json()["config"]["max_num_waiting"] == 1024
    assert "s3cret" not in answer.text


def test_the_prefix_cache_is_reset_by_who_may(harness: RestHarness) -> None:
    before = harness.engine.num_resets
    assert harness.client.post("/reset_prefix_cache").status_code == 401
    assert harness.client.post("/reset_prefix_cache", headers=KEY).json() == {"success": True}
    assert harness.engine.num_resets == before + 1


def test_tokenizer_info_is_there_where_it_is_enabled(harness: RestHarness, plain: RestHarness) -> None:
    info = harness.client.get("/tokenizer_info", headers=KEY).json()
    assert info["chat_template"] == info["chat_templates"]["default"]
    assert info["vocab_size"] > 100
    assert "eos_token" in info["special_tokens"]
    assert plain.client.get("/tokenizer_info").status_code == 404


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"prompt": "a", "max_tokens": 2}, "text_completion"),
        ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}, "chat.completion"),
    ],
)
def test_invocations_answer_as_the_route_of_their_body(harness: RestHarness, body: dict[str, Any], kind: str) -> None:
    path = "/v1/completions" if kind == "text_completion" else "/v1/chat/completions"
    there = harness.client.post(path, json=body, headers=KEY).json()
    here = harness.client.post("/invocations", json=body, headers=KEY).json()
    for changing in ("id", "created"):
        del there[changing], here[changing]
    assert here == there
    assert here["object"] == kind
    stream = harness.client.post("/invocations", json={**body, "stream": True}, headers=KEY)
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.text.endswith("data: [DONE]\n\n")


def test_mistakes_of_invocations_are_openais_errors(harness: RestHarness) -> None:
    assert harness.client.post("/invocations", json={"prompt": "a"}).status_code == 401
    answer = harness.client.post("/invocations", json={"prompt": "a", "model": "other"}, headers=KEY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    answer = harness.client.post("/invocations", json={"text": "a"}, headers=KEY)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def preflight(harness: RestHarness, origin: str, method: str = "POST") -> Any:
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization",
    }
    return harness.client.options("/v1/chat/completions", headers=headers)


def test_a_page_of_an_allowed_origin_may_ask_before_it_has_sent_its_key(harness: RestHarness) -> None:
    answer = preflight(harness, ORIGIN)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    assert preflight(harness, ORIGIN, "DELETE").status_code == 400
    assert preflight(harness, "https://evil.example.com").status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_answers_and_errors_say_which_origin_may_read_them(harness: RestHarness, stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": 3, "stream": stream}
    answer = harness.client.post("/v1/completions", json=body, headers={**KEY, "origin": ORIGIN})
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    other = harness.client.post("/v1/completions", json=body, headers={**KEY, "origin": "https://evil.example.com"})
    assert "access-control-allow-origin" not in other.headers
    refused = harness.client.post("/v1/completions", json=body, headers={"origin": ORIGIN})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == ORIGIN


def test_without_allowed_origins_pages_get_nothing(plain: RestHarness) -> None:
    assert preflight(plain, ORIGIN).status_code == 405
    answer = plain.client.get("/v1/models", headers={"origin": ORIGIN})
    assert answer.status_code == 200
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_the_description_of_the_routes_can_be_left_out(harness: RestHarness, plain: RestHarness) -> None:
    assert harness.client.get("/openapi.json").status_code == 200
    assert [plain.client.get(path).status_code for path in ("/docs", "/openapi.json")] == [404, 404]
