"""/v1/completions/render and /v1/chat/completions/render: what the engine would be asked, in vLLM's shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pagoda.serving.openai.render import RenderedRequest
from tests.support.rest_harness import RestHarness

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "grün 🙂?"}]
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}


@pytest.fixture(scope="module")
def harness() -> Iterator[RestHarness]:
    with RestHarness() as running:
        yield running


def rendered(harness: RestHarness, path: str, body: dict[str, Any]) -> Any:
    before = len(harness.engine.submitted)
    answer = harness.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert len(harness.engine.submitted) == before  # nothing was generated
    return answer.json()


@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
def test_a_conversation_has_the_ids_that_the_engine_gets(harness: RestHarness, prefix: str) -> None:
    body = {
        "model": "demo",
        "messages": MESSAGES,
        "max_tokens": 3,
        "temperature": 0.5,
        "cache_salt": "s",
        "priority": 2,
    }
    typed = RenderedRequest.model_validate(rendered(harness, f"{prefix}/chat/completions/render", body), strict=True)
    harness.client.post(f"{prefix}/chat/completions", json=body)
    asked = harness.engine.submitted[-1]
    assert typed.request_id.startswith("chatcmpl-")
    assert (typed.token_ids, typed.model, typed.stream) == (asked.prompt_token_ids, "demo", False)
    assert (typed.cache_salt, typed.priority) == ("s", 2)
    assert (typed.sampling_params["max_tokens"], typed.sampling_params["temperature"]) == (3, 0.5)


def test_every_prompt_of_completions_is_an_object(harness: RestHarness) -> None:
    prompts = ["one", "two words"]
    body = {"prompt": prompts, "n": 2, "seed": 7, "stream": True, "stream_options": {"include_usage": True}}
    first, second = rendered(harness, "/v1/completions/render", body)
    for made, prompt in zip((first, second), prompts, strict=True):
        ids = harness.client.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
        assert made["token_ids"] == ids
        assert (made["sampling_params"]["n"], made["sampling_params"]["seed"]) == (2, 7)
        # What the context leaves, as nothing was asked.
        assert made["sampling_params"]["max_tokens"] == 128 - len(ids)
    assert first["request_id"].startswith("cmpl-")
    assert first["stream"]
    assert first["stream_options"] == {"include_usage": True}


def test_a_prompt_of_ids_is_rendered_as_it_is(harness: RestHarness) -> None:
    (made,) = rendered(harness, "/v1/completions/render", {"prompt": [5, 6, 7]})
    assert made["token_ids"] == [5, 6, 7]


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
        ({"guided_regex": "[ab]+"}, {"regex": "[ab]+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            {"json": SCHEMA, "disable_any_whitespace": True},
        ),
        ({}, None),
    ],
)
def test_forms_are_shown_by_vllms_names(harness: RestHarness, asked: dict[str, Any], shown: Any) -> None:
    (made,) = rendered(harness, "/v1/completions/render", {"prompt": "a", **asked})
    assert made["sampling_params"]["structured_outputs"] == shown


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/completions/render", {"prompt": []}, 400, "invalid_request"),
        ("/v1/completions/render", {"prompt": [1] * 500}, 400, "context_length_exceeded"),
        ("/v1/completions/render", {"prompt": "a", "temperature": -1}, 400, "invalid_request"),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "a " * 500}]}, 400, None),
        ("/v1/chat/completions/render", {"messages": MESSAGES, "audio": {"voice": "a"}}, 400, "unsupported_parameter"),
        ("/v1/chat/completions/render", {"model": "other", "messages": MESSAGES}, 404, None),
    ],
)
def test_errors_are_those_of_generating(
    harness: RestHarness, path: str, body: dict[str, Any], status: int, code: str | None
) -> None:
    answer = harness.client.post(path, json=body)
    generating = harness.client.post(path.removesuffix("/render"), json=body)
    assert answer.status_code == generating.status_code == status
    assert answer.json() == generating.json()
    assert code is None or answer.json()["error"]["code"] == code
