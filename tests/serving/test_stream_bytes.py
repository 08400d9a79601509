"""What goes over the wire of a stream: each event is JSON as one encoder writes it, whichever way it was put together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from pagoda.serving.http.event_stream import EventTemplate, event
from tests.support.rest_harness import RestHarness

PROMPT = 'say "a\\b"\r\n\tgrün 🙂 \u2028 \ufffd \x00\x1f </script> 速度 data: [DONE]'
COMPLETION = {"model": "demo", "prompt": PROMPT, "max_tokens": 90, "ignore_eos": True, "stream": True}
CHAT = {
    "model": "demo",
    "messages": [{"role": "user", "content": PROMPT}],
    "max_tokens": 90,
    "ignore_eos": True,
    "stream": True,
}
GENERATE = {"text_input": PROMPT, "max_tokens": 90}


@pytest.fixture(scope="module")
def harness() -> Iterator[RestHarness]:
    with RestHarness(max_model_len=512) as running:
        yield running


def payloads(harness: RestHarness, path: str, body: dict[str, Any]) -> list[bytes]:
    """What the events of a stream say, up to `[DONE]` where there is one."""
    *events, rest = harness.client.post(path, json=body).content.split(b"\n\n")
    assert rest == b""
    assert all(one.startswith(b"data: ") for one in events)
    return [one.removeprefix(b"data: ") for one in events if one != b"data: [DONE]"]


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"stop": ["never"]}, {"stream_options": {"include_usage": True}}])
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)], ids=["chat", "completions"]
)
def test_every_event_is_encoded_as_a_whole_one_would_be(
    harness: RestHarness, path: str, body: dict[str, Any], more: dict[str, Any]
) -> None:
    contents = []
    for payload in payloads(harness, path, body | more):
        contents.append(orjson.loads(payload))
        assert orjson.dumps(contents[-1]) == payload
    usage = contents.pop() if more.get("stream_options") else None
    heads = [
        {**content, "choices": [set(choice) - {"stop_reason"} for choice in content["choices"]]} for content in contents
    ]
    assert [head for head in heads if head != heads[0]] == []
    whole = harness.client.post(
        path, json=body | {key: more[key] for key in ("n", "stop") if key in more} | {"stream": False}
    )
    for choice in whole.json()["choices"]:
        parts = [c["choices"][0] for c in contents if c["choices"][0]["index"] == choice["index"]]
        texts = [part["delta"].get("content", "") if "delta" in part else part["text"] for part in parts]
        assert "".join(texts) == (choice["message"]["content"] if "message" in choice else choice["text"])
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        assert len(parts) > 40  # nearly every token has an event of its own
    if usage is not None:
        assert all(content["usage"] is None for content in contents)
        assert usage["choices"] == []
        assert usage["usage"] == whole.json()["usage"]


def test_events_of_generate_have_the_same_head_and_join_to_the_whole(harness: RestHarness) -> None:
    found = payloads(harness, "/v2/models/demo/generate_stream", GENERATE | {"id": 'mine "1"'})
    contents = [orjson.loads(payload) for payload in found]
    assert [orjson.dumps(content) for content in contents] == found
    assert {(content["id"], content["model_name"], content["model_version"]) for content in contents} == {
        ('mine "1"', "demo", "1")
    }
    whole = harness.client.post("/v2/models/demo/generate", json=GENERATE).json()
    assert "".join(content["text_output"] for content in contents) == whole["text_output"]
    assert contents[-1]["num_output_tokens"] == whole["num_output_tokens"]


@pytest.mark.parametrize("text", [PROMPT, "", '"', "\\", "🙂", "\ud7ff\ue000"])
def test_a_template_gives_the_event_of_its_content(text: str) -> None:
    def content(text: str) -> dict[str, Any]:
        return {"id": 'a "b"', "choices": [{"text": text, "finish_reason": None}], "usage": None}

    assert EventTemplate(content)(text) == event(content(text))
