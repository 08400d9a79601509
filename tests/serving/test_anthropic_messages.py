"""/v1/messages with Anthropic's own client, and what Claude Code sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.serving.test_openai_tools import ANSWER, CALLS, TEMPLATE
from tests.support.rest_harness import RestHarness, harness_with_template

MESSAGES: list[Any] = [{"role": "user", "content": "How is the weather in Rome?"}]
TOOLS: list[Any] = [
    {
        "name": "get_weather",
        "description": "Weather of a city",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        "cache_control": {"type": "ephemeral"},
    },
    {"name": "get_time", "input_schema": {"type": "object"}},
]
# What Claude Code may send: blocks with cache marks, a billing header of its own in each request, system messages among
# the others, tools that run at Anthropic, and options that only Anthropic knows.
AGENT: dict[str, Any] = {
    "model": "demo",
    "max_tokens": 32000,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.154; cch=NUMBER;"},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "<system-reminder>Today.</system-reminder>"}]},
        {"role": "system", "content": "Be quick."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I must look.", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Looking."},
                {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "20 degrees"}],
                    "is_error": False,
                    "cache_control": {"type": "ephemeral"},
                },
                {"type": "text", "text": "And?"},
            ],
        },
    ],
    "tools": [*TOOLS, {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
    "tool_choice": {"type": "auto"},
    "metadata": {"user_id": "user_1"},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": []},
    "output_config": {"effort": "high"},
    "temperature": 1,
    "stream": True,
}
# What Claude Code 2.1.197 sent, recorded, shortened: behind its first call, and for a session's title.
RECORDED: dict[str, Any] = {
    "model": "demo",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>\nToday.\n</system-reminder>"},
                {"type": "text", "text": "What is in a.py?"},
            ],
        },
        {"role": "system", "content": "Available agent types."},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "call_1", "name": "Read", "input": {"file_path": "a.py"}}],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "content": "<tool_use_error>No such file.</tool_use_error>",
                    "is_error": True,
                    "tool_use_id": "call_1",
                    "cache_control": {"type": "ephemeral"},
                }
            ],
        },
    ],
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.84c; cc_entrypoint=sdk-cli;"},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
    ],
    "tools": [
        {
            "name": "Read",
            "description": "Reads a file.",
            "input_schema": {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "object",
                "properties": {"file_path": {"type": "string"}, "limit": {"type": "integer", "exclusiveMinimum": 0}},
                "required": ["file_path"],
                "additionalProperties": False,
            },
        }
    ],
    "metadata": {"user_id": '{"device_id":"5e63","account_uuid":"","session_id":"998c"}'},
    "max_tokens": 300,
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "stream": True,
}
TITLE: dict[str, Any] = {
    **{name: RECORDED[name] for name in ("model", "system", "metadata", "max_tokens", "stream")},
    "messages": [{"role": "user", "content": [{"type": "text", "text": "<session>\nHello\n</session>"}]}],
    "tools": [],
    "output_config": {
        "effort": "high",
        "format": {
            "type": "json_schema",
            "schema": {
                "type": "object",
                "properties": {"title": {"type": "string"}},
                "required": ["title"],
                "additionalProperties": False,
            },
        },
    },
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestHarness]:
    with harness_with_template(TEMPLATE, tmp_path_factory.mktemp("templates")) as running:
        yield running


@pytest.fixture(scope="module")
def client(harness: RestHarness) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=harness.url, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_script(harness: RestHarness) -> Iterator[None]:
    yield
    harness.engine.script = None
    harness.engine.num_cached_tokens = 0


def answers(harness: RestHarness, text: str) -> None:
    harness.engine.script = harness.pool.tokenizer.encode(text, add_special_tokens=False)


def last_prompt(harness: RestHarness) -> str:
    return harness.pool.tokenizer.decode(harness.engine.submitted[-1].prompt_token_ids, skip_special_tokens=False)


def shapes(message: Any) -> list[Any]:
    """Blocks without what differs from answer to answer."""
    return [
        block.model_dump(exclude={"id", "signature", "citations", "caller", "toolset_name"})
        for block in message.content
    ]


EXPECTED = [
    {"type": "thinking", "thinking": "The user wants 塔."},
    {"type": "text", "text": "Let me look."},
    {"type": "tool_use", "name": "get_weather", "input": {"city": "Rome 🙂", "days": 2}},
    {"type": "tool_use", "name": "get_time", "input": {}},
]


def test_a_message_has_blocks(harness: RestHarness, client: anthropic.Anthropic) -> None:
    answers(harness, ANSWER)
    harness.engine.num_cached_tokens = 16
    message = client.messages.create(model="demo", max_tokens=500, messages=MESSAGES, tools=TOOLS)
    assert shapes(message) == EXPECTED
    assert message.stop_reason == "tool_use"
    prompt_tokens = len(harness.engine.submitted[-1].prompt_token_ids)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (prompt_tokens - 16, 16)


def test_a_stream_says_what_the_whole_message_says(harness: RestHarness, client: anthropic.Anthropic) -> None:
    answers(harness, ANSWER)
    whole = client.messages.create(model="demo", max_tokens=500, messages=MESSAGES, tools=TOOLS)
    with client.messages.stream(model="demo", max_tokens=500, messages=MESSAGES, tools=TOOLS) as stream:
        names = [event.type for event in stream]
        final = stream.get_final_message()
    assert shapes(final) == shapes(whole) == EXPECTED
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert names[0] == "message_start"
    assert names[-1] == "message_stop"


def test_events_come_one_block_after_another(harness: RestHarness) -> None:
    answers(harness, ANSWER)
    body = {"model": "demo", "max_tokens": 500, "messages": MESSAGES, "tools": TOOLS, "stream": True}
    events: list[dict[str, Any]] = []
    with harness.client.stream("POST", "/v1/messages?beta=true", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["type"] for event in events][:2] == ["message_start", "ping"]
    assert [event["type"] for event in events][-2:] == ["message_delta", "message_stop"]
    block, expected = None, 0
    for event in events[2:-2]:
        match event["type"]:
            case "content_block_start":
                assert (block, event["index"]) == (None, expected)
                block, expected = event["index"], expected + 1
            case "content_block_delta":
                assert event["index"] == block
            case "content_block_stop":
                assert event["index"] == block
                block = None
    assert expected == 4
    kinds = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    assert kinds.index("signature_delta") < kinds.index("text_delta")


def test_an_agents_request_is_understood(harness: RestHarness) -> None:
    answers(harness, "fine")
    prompts = []
    for number in ("1", "2"):
        body = json.loads(json.dumps(AGENT).replace("NUMBER", number))
        headers = {"anthropic-beta": "claude-code-20250219", "anthropic-version": "2023-06-01", "x-api-key": "none"}
        response = harness.client.post("/v1/messages?beta=true", json=body, headers=headers)
        assert response.status_code == 200, response.text
        prompts.append(last_prompt(harness))
    assert prompts[0] == prompts[1]
    prompt = prompts[0]
    assert "billing" not in prompt
    assert "web_search" not in prompt
    for part in (
        "<|im_start|>system\nYou are an agent.",
        "<|im_start|>system\nBe quick.",
        "<think>\nI must look.\n</think>\n\nLooking.\n<tool_call>",
        '{"name": "get_weather", "arguments": {"city": "Rome"}}',
        "<|im_start|>tool\n20 degrees<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>",
    ):
        assert part in prompt
    assert prompt.endswith("effort=high")
    # More than the context holds: a bound.
    submitted = harness.engine.submitted[-1]
    assert submitted.num_prompt_tokens + submitted.max_tokens == 4096


def test_what_claude_code_sent_is_answered(harness: RestHarness) -> None:
    betas = "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27,effort-2025-11-24"
    headers = {
        "anthropic-beta": betas,
        "anthropic-version": "2023-06-01",
        "authorization": "Bearer none",
        "x-app": "cli",
    }
    assert harness.client.head("/").status_code == 200
    for body, text in ((RECORDED, "There is none."), (TITLE, '{"title": "Hello"}')):
        answers(harness, text)
        response = harness.client.post("/v1/messages?beta=true", json=body, headers=headers)
        assert response.status_code == 200, response.text
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
        said = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        assert "".join(delta["text"] for delta in said) == text
        assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
        if body is RECORDED:
            prompt = last_prompt(harness)
            assert '{"name": "Read", "arguments": {"file_path": "a.py"}}' in prompt
            assert "<|im_start|>tool\n<tool_use_error>No such file.</tool_use_error><|im_end|>" in prompt
    grammar = harness.engine.submitted[-1].params.structured_outputs
    assert grammar is not None
    assert grammar.kind == "json_schema"
    for tools in ([], RECORDED["tools"]):
        counted = {"model": "demo", "messages": [{"role": "user", "content": "foo"}], "tools": tools}
        answer = harness.client.post("/v1/messages/count_tokens?beta=true", json=counted, headers=headers)
        assert answer.json()["input_tokens"] > 0


def test_tokens_are_counted_as_they_are_sent(harness: RestHarness, client: anthropic.Anthropic) -> None:
    client.messages.create(model="demo", max_tokens=1, messages=MESSAGES, tools=TOOLS, system="Be brief.")
    sent = len(harness.engine.submitted[-1].prompt_token_ids)
    counted = client.messages.count_tokens(model="demo", messages=MESSAGES, tools=TOOLS, system="Be brief.")
    assert counted.input_tokens == sent


@pytest.mark.parametrize(
    ("arguments", "reason", "sequence"),
    [
        ({}, "end_turn", None),
        ({"max_tokens": 2}, "max_tokens", None),
        ({"stop_sequences": ["three"]}, "stop_sequence", "three"),
    ],
)
def test_stop_reasons(
    harness: RestHarness, client: anthropic.Anthropic, arguments: Any, reason: str, sequence: str | None
) -> None:
    answers(harness, "one two three four")
    message = client.messages.create(**{"model": "demo", "max_tokens": 100, "messages": MESSAGES, **arguments})
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_a_call_that_is_cut_off_has_what_there_is(harness: RestHarness, client: anthropic.Anthropic) -> None:
    answers(harness, CALLS)
    cut = len(harness.pool.tokenizer.encode(CALLS[: CALLS.index(', "days')], add_special_tokens=False))
    message = client.messages.create(model="demo", max_tokens=cut, messages=MESSAGES, tools=TOOLS)
    (block,) = message.content
    assert block.type == "tool_use"
    assert block.input in ({}, {"city": "Rome 🙂"})
    assert message.stop_reason == "max_tokens"


@pytest.mark.parametrize(
    ("thinking", "end"),
    [({"type": "disabled"}, "<think>\n\n</think>\n\n"), ({"type": "enabled", "budget_tokens": 1024}, "assistant\n")],
)
def test_thinking_reaches_the_template(
    harness: RestHarness, client: anthropic.Anthropic, thinking: Any, end: str
) -> None:
    client.messages.create(model="demo", max_tokens=1, messages=MESSAGES, thinking=thinking)
    assert last_prompt(harness).endswith(end)


@pytest.mark.parametrize(
    ("fields", "status", "kind", "named"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request_error", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, 400, "invalid_request_error", "'x'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "image",
        ),
        ({"messages": [{"role": "user", "content": [1]}]}, 400, "invalid_request_error", "messages"),
        ({"tool_choice": {"type": "sometimes"}}, 400, "invalid_request_error", "tool_choice"),
        ({"model": "other"}, 404, "not_found_error", "other"),
        ({"thinking": {"type": "deep"}}, 400, "invalid_request_error", "adaptive"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
    ],
)
def test_errors_have_anthropics_shape(
    harness: RestHarness, fields: dict[str, Any], status: int, kind: str, named: str
) -> None:
    body = {"model": "demo", "max_tokens": 8, "messages": MESSAGES, **fields}
    response = harness.client.post("/v1/messages", json=body)
    assert response.status_code == status
    error = response.json()
    assert error["type"] == "error"
    assert error["error"]["type"] == kind
    assert named in error["error"]["message"]


def test_an_error_in_a_stream_is_an_event(harness: RestHarness, client: anthropic.Anthropic) -> None:
    from pagoda.errors import ErrorKind

    harness.engine.fail_after = (3, ErrorKind.INTERNAL)
    try:
        with (
            pytest.raises(anthropic.APIStatusError, match="failed as asked"),
            client.messages.stream(model="demo", max_tokens=50, messages=MESSAGES) as stream,
        ):
            stream.get_final_message()
    finally:
        harness.engine.fail_after = None
