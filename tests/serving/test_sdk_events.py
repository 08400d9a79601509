"""Every event of a stream is one of the vendor's types, in the vendor's order, and all add up to the whole answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from pagoda.errors import ErrorKind
from tests.serving.test_openai_tools import ANSWER, CALLS, TEMPLATE
from tests.support.rest_harness import RestHarness, harness_with_template
from tests.support.sdk_events import (
    chat_stream,
    checked_chat,
    checked_message,
    checked_response,
    message_stream,
    response_stream,
)

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
NAMES = ("get_weather", "get_time")
QUESTION = "How is the weather in Rome?"
ONE_CALL = CALLS.partition("\n<tool_call>")[0]
ANSWERS = {
    "empty": "",
    "text": "It is warm, 20 °C 🙂.",
    "space": " \n",
    "reasoning": "<think>\nHm.\n</think>\n\n",
    "reasoning and text": "<think>\nHm.\n</think>\n\nWarm.",
    "call": ONE_CALL,
    "calls": CALLS,
    "all": ANSWER,
    "text behind a call": f"First.\n{ONE_CALL}\nThen.",
    "text between calls": f"First.\n{ONE_CALL}\nThen.\n{ONE_CALL}",
    "reasoning twice": "<think>\nHm.\n</think>\n\nWarm.\n<think>\nNo.\n</think>\n\nCold.",
    "unknown tool": '<tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call>',
    "broken arguments": '<tool_call>\n{"name": "get_weather", "arguments": {"city": Rome}}\n</tool_call>',
    "no arguments": '<tool_call>\n{"name": "get_time"}\n</tool_call>',
    "markers alone": "<think></think><tool_call></tool_call>",
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestHarness]:
    with harness_with_template(TEMPLATE, tmp_path_factory.mktemp("templates")) as running:
        yield running


@pytest.fixture(autouse=True)
def _as_before(harness: RestHarness) -> Iterator[None]:
    yield
    harness.engine.script = None
    harness.engine.num_cached_tokens = 0
    harness.engine.fail_after = None


def answers(harness: RestHarness, text: str) -> int:
    harness.engine.script = harness.pool.tokenizer.encode(text, add_special_tokens=False)
    return len(harness.engine.script)


def limits(num_tokens: int) -> list[int | None]:
    """None, and lengths at which the answer is cut: at its beginning, in the middle of everything, before its end."""
    if num_tokens == 0:
        return [None]
    return [None, *sorted({1, 2, *range(5, num_tokens, 24), max(1, num_tokens - 1)})]


def post(harness: RestHarness, path: str, body: dict[str, Any]) -> Any:
    response = harness.client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def without_ids(value: Any) -> Any:
    """Without what differs from answer to answer, and what is absent."""
    if isinstance(value, dict):
        random = {"id", "call_id", "created", "created_at", "signature", "parsed", "parsed_arguments", "parsed_output"}
        return {name: without_ids(each) for name, each in value.items() if each is not None and name not in random}
    return [without_ids(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", ANSWERS)
def test_responses(harness: RestHarness, kind: str) -> None:
    num_tokens = answers(harness, ANSWERS[kind])
    tools = [{"type": "function", "name": name, "parameters": PARAMETERS} for name in NAMES]
    for limit in limits(num_tokens):
        body = {"input": QUESTION, "tools": tools, "max_output_tokens": limit}
        whole = post(harness, "/v1/responses", body)
        checked_response(whole)
        _, streamed = response_stream(harness.client, body)
        assert without_ids(streamed) == without_ids(whole)
        assert streamed["status"] == ("completed" if limit is None else "incomplete")


@pytest.mark.parametrize("kind", ANSWERS)
def test_messages(harness: RestHarness, kind: str) -> None:
    num_tokens = answers(harness, ANSWERS[kind])
    harness.engine.num_cached_tokens = 3
    tools = [{"name": name, "input_schema": PARAMETERS} for name in NAMES]
    for limit in limits(num_tokens):
        body = {"messages": [{"role": "user", "content": QUESTION}], "tools": tools, "max_tokens": limit or 500}
        whole = checked_message(post(harness, "/v1/messages", body))
        if kind != "broken arguments":  # Anthropic's helper takes no JSON that is none
            _, streamed = message_stream(harness.client, body)
            assert without_ids(streamed) == without_ids(whole.model_dump())
        if limit is not None:
            assert whole.stop_reason == "max_tokens"
        else:
            assert whole.stop_reason == ("tool_use" if any(b.type == "tool_use" for b in whole.content) else "end_turn")


@pytest.mark.parametrize("kind", ANSWERS)
def test_chats(harness: RestHarness, kind: str) -> None:
    num_tokens = answers(harness, ANSWERS[kind])
    tools = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in NAMES]
    for limit in limits(num_tokens):
        body = {
            "messages": [{"role": "user", "content": QUESTION}],
            "tools": tools,
            "max_tokens": limit,
            "n": 3,
            "stream_options": {"include_usage": True},
        }
        whole = checked_chat(post(harness, "/v1/chat/completions", {**body, "stream_options": None}))
        streamed = chat_stream(harness.client, body)
        for choice in streamed["choices"]:
            for call in choice["message"].get("tool_calls") or ():
                del call["index"]
            if choice["message"]["content"] == "":
                choice["message"]["content"] = whole.choices[choice["index"]].message.content
        assert without_ids({**streamed, "object": ""}) == without_ids({**whole.model_dump(), "object": ""})


def test_responses_with_logprobs_and_tools_of_other_kinds(harness: RestHarness) -> None:
    answers(harness, f'{ANSWERS["reasoning and text"]}\n{ONE_CALL.replace("get_weather", "mcp__get_weather")}\n'
            '<tool_call>\n{"name": "patch", "arguments": {"input": "*** 🙂"}}\n</tool_call>')  # fmt: skip
    tools = [
        {"type": "custom", "name": "patch"},
        {
            "type": "namespace",
            "name": "mcp",
            "description": "",
            "tools": [{"type": "function", "name": "get_weather", "parameters": PARAMETERS}],
        },
    ]
    body = {
        "input": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "No."}],
        "tools": tools,
        "top_logprobs": 2,
        "temperature": 0.5,
        "metadata": {"a": "b"},
        "reasoning": {"effort": "high"},
        "text": {"verbosity": "low"},
    }
    whole = post(harness, "/v1/responses", body)
    checked_response(whole)
    _, streamed = response_stream(harness.client, body)
    assert without_ids(streamed) == without_ids(whole)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call", "custom_tool_call"]
    _, further = response_stream(harness.client, {**body, "previous_response_id": streamed["id"]})
    assert further["previous_response_id"] == streamed["id"]


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 30, 60])
def test_a_stream_that_fails_ends_as_the_vendors_say(harness: RestHarness, num_tokens: int) -> None:
    answers(harness, ANSWER)
    harness.engine.fail_after = (num_tokens, ErrorKind.INTERNAL)
    tools = [{"type": "function", "name": name, "parameters": PARAMETERS} for name in NAMES]
    _, failed = response_stream(harness.client, {"input": QUESTION, "tools": tools})
    assert failed["error"] == {"code": "server_error", "message": "failed as asked"}
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 500}
    events, _ = message_stream(harness.client, body)
    assert events[-1] == {"type": "error", "error": {"type": "api_error", "message": "failed as asked"}}


def test_a_stop_sequence_ends_a_message(harness: RestHarness) -> None:
    answers(harness, "one two three four")
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 50, "stop_sequences": ["three"]}
    whole = checked_message(post(harness, "/v1/messages", body))
    _, streamed = message_stream(harness.client, body)
    assert without_ids(streamed) == without_ids(whole.model_dump())
    assert (streamed["stop_reason"], streamed["stop_sequence"]) == ("stop_sequence", "three")
    assert re.fullmatch("one two ?", streamed["content"][0]["text"])


def test_a_message_that_fills_the_context_says_so(harness: RestHarness) -> None:
    harness.engine.script = None  # the prompt, over and over
    context = harness.engine.ready.max_model_len if harness.engine.ready else 0
    body = {"messages": [{"role": "user", "content": "a " * (context - 300)}], "max_tokens": context}
    whole = checked_message(post(harness, "/v1/messages", body))
    assert whole.stop_reason == "model_context_window_exceeded"
    assert post(harness, "/v1/messages", {**body, "max_tokens": 1})["stop_reason"] == "max_tokens"
