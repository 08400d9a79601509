"""/v1/responses with OpenAI's own client, and what Codex sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from pagoda.errors import ErrorKind, ModelNotFoundError
from pagoda.serving.openai.responses.store import ResponseStore
from tests.serving.test_openai_tools import ANSWER, CALLS, TEMPLATE
from tests.support.rest_harness import RestHarness, harness_with_template

TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "get_weather",
        "description": "Weather of a city",
        "strict": False,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
    {"type": "function", "name": "get_time", "parameters": {}},
]
QUESTION = "How is the weather in Rome?"
# What Codex may send.
AGENT: dict[str, Any] = {
    "model": "demo",
    "instructions": "You are an agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be quick."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List files."}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "I list."}]},
        {"type": "function_call", "name": "shell", "arguments": '{"command":["ls"]}', "call_id": "call_1"},
        {"type": "function_call", "name": "read", "namespace": "mcp", "arguments": "{}", "call_id": "call_2"},
        {"type": "function_call_output", "call_id": "call_1", "output": "a.txt"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "none"}]},
        {"type": "custom_tool_call", "name": "apply_patch", "input": "*** Begin", "call_id": "call_3"},
        {"type": "custom_tool_call_output", "call_id": "call_3", "output": "done"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
    ],
    "tools": [
        {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object", "properties": {}}},
        {"type": "custom", "name": "apply_patch", "description": "Edit files", "format": {"type": "grammar"}},
        {"type": "namespace", "name": "mcp", "tools": [{"type": "function", "name": "read", "parameters": {}}]},
        {"type": "web_search"},
        {"type": "local_shell"},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "high", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "k",
    "text": {"verbosity": "low"},
    "service_tier": "auto",
}


# What Codex 0.171 sent behind its first call, recorded, shortened.
RECORDED: dict[str, Any] = {
    "model": "demo",
    "stream": True,
    "input": [
        {
            "type": "message",
            "id": "msg_1",
            "role": "developer",
            "content": [{"type": "input_text", "text": "You are a coding agent."}],
        },
        {"type": "message", "id": "msg_2", "role": "user", "content": [{"type": "input_text", "text": "The goal?"}]},
        {
            "type": "function_call",
            "status": "completed",
            "id": "fc_1",
            "name": "get_goal",
            "arguments": "{\n  }",
            "call_id": "call_1",
        },
        {"type": "function_call_output", "id": "fco_1", "call_id": "call_1", "output": '{"goal":null}'},
    ],
    "tools": [
        {
            "type": "function",
            "name": "get_goal",
            "description": "Get the goal.",
            "strict": False,
            "parameters": {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
        },
        {
            "type": "namespace",
            "name": "multi_agent_v1",
            "description": "Agents.",
            "tools": [{"type": "function", "name": "wait_agent", "strict": False, "parameters": {"type": "object"}}],
        },
        {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "01a2",
    "text": {
        "format": {
            "type": "json_schema",
            "strict": True,
            "name": "codex_output_schema",
            "schema": {"type": "object", "properties": {"lines": {"type": "integer"}}, "required": ["lines"]},
        }
    },
    "client_metadata": {"turn_id": "01a2", "x-codex-turn-metadata": '{"request_kind":"turn"}'},
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestHarness]:
    with harness_with_template(TEMPLATE, tmp_path_factory.mktemp("templates")) as running:
        yield running


@pytest.fixture(scope="module")
def client(harness: RestHarness) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=harness.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(autouse=True)
def _as_before(harness: RestHarness) -> Iterator[None]:
    yield
    harness.engine.script = None
    harness.engine.num_cached_tokens = 0
    harness.engine.fail_after = None


def answers(harness: RestHarness, text: str) -> None:
    harness.engine.script = harness.pool.tokenizer.encode(text, add_special_tokens=False)


def last_prompt(harness: RestHarness) -> str:
    return harness.pool.tokenizer.decode(harness.engine.submitted[-1].prompt_token_ids, skip_special_tokens=False)


def shapes(response: Any) -> list[Any]:
    """Items without what differs from answer to answer, and what the client adds."""
    items = []
    for item in response.output:
        match item.type:
            case "reasoning":
                items.append(("reasoning", item.content[0].text))
            case "message":
                items.append(("message", item.content[0].text))
            case _:
                items.append((item.type, item.name, item.arguments))
    return items


EXPECTED = [
    ("reasoning", "The user wants 塔."),
    ("message", "Let me look."),
    ("function_call", "get_weather", '{"city": "Rome 🙂", "days": 2}'),
    ("function_call", "get_time", "{}"),
]


def events_of(harness: RestHarness, body: dict[str, Any]) -> list[dict[str, Any]]:
    with harness.client.stream("POST", "/v1/responses", json={**body, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    events = [json.loads(data.removeprefix("data: ")) for data in lines[1::2]]
    assert lines[::2] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_a_response_has_items(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, ANSWER)
    harness.engine.num_cached_tokens = 16
    response = client.responses.create(model="demo", input=QUESTION, tools=TOOLS, instructions="Be brief.")
    assert shapes(response) == EXPECTED
    assert response.status == "completed"
    assert response.output_text == "Let me look."
    assert response.usage is not None
    assert response.usage.input_tokens == harness.engine.submitted[-1].num_prompt_tokens
    assert response.usage.input_tokens_details.cached_tokens == 16
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    assert "<|im_start|>system\nBe brief.<|im_end|>" in last_prompt(harness)


def test_a_stream_says_what_the_whole_response_says(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, ANSWER)
    whole = client.responses.create(model="demo", input=QUESTION, tools=TOOLS)
    with client.responses.stream(model="demo", input=QUESTION, tools=TOOLS) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert shapes(final) == shapes(whole) == EXPECTED
    assert final.usage == whole.usage
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "Let me look."


@pytest.mark.parametrize("asked", [{"top_logprobs": 2}, {"include": ["message.output_text.logprobs"]}])
def test_texts_have_the_logprobs_of_their_tokens(harness: RestHarness, asked: dict[str, Any]) -> None:
    answers(harness, ANSWER)
    events = events_of(harness, {"input": QUESTION, "tools": TOOLS, **asked})
    (part,) = (
        event["part"]
        for event in events
        if event["type"] == "response.content_part.done" and event["part"]["type"] == "output_text"
    )
    # Its own tokens, and neither those of the reasoning before nor of the calls behind it.
    assert "".join(each["token"] for each in part["logprobs"]).strip() == part["text"] == "Let me look."
    assert {len(each["top_logprobs"]) for each in part["logprobs"]} == {asked.get("top_logprobs", 0)}
    deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [each for delta in deltas for each in delta] == part["logprobs"]
    assert all("logprobs" not in event for event in events if event["type"] == "response.reasoning_text.delta")


def test_events_come_one_item_after_another(harness: RestHarness) -> None:
    answers(harness, ANSWER)
    events = events_of(harness, {"input": QUESTION, "tools": TOOLS})
    names = [event["type"] for event in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.completed"
    is_open, number = False, 0
    for event in events[2:-1]:
        if event["type"] == "response.output_item.added":
            assert (is_open, event["output_index"]) == (False, number)
            is_open, number = True, number + 1
        else:
            assert is_open
            assert event["output_index"] == number - 1
            is_open = event["type"] != "response.output_item.done"
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    assert {name for name in names if "reasoning" in name} == {
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
    }


def test_an_agents_request_is_understood(harness: RestHarness) -> None:
    call = '<tool_call>\n{"name": "apply_patch", "arguments": {"input": "*** Begin\\n+x"}}\n</tool_call>'
    answers(harness, call + '\n<tool_call>\n{"name": "mcp__read", "arguments": {"a": 1}}\n</tool_call>')
    events = events_of(harness, AGENT)
    assert events[-1]["type"] == "response.completed"
    patch, read = events[-1]["response"]["output"]
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "apply_patch", "*** Begin\n+x")
    assert (read["type"], read["namespace"], read["name"]) == ("function_call", "mcp", "read")
    assert "response.custom_tool_call_input.done" in [event["type"] for event in events]
    prompt = last_prompt(harness)
    for part in (
        "<|im_start|>system\nYou are an agent.\n\nBe quick.<|im_end|>",
        "<|im_start|>assistant\n<think>\nI list.\n</think>\n\n\n<tool_call>\n"
        '{"name": "shell", "arguments": {"command": ["ls"]}}\n</tool_call>\n<tool_call>\n{"name": "mcp__read"',
        "<|im_start|>tool\na.txt<|im_end|>\n<|im_start|>tool\nnone<|im_end|>",
        '{"name": "apply_patch", "arguments": {"input": "*** Begin"}}',
    ):
        assert part in prompt
    assert "web_search" not in prompt
    assert prompt.endswith("effort=high")


def test_what_codex_sent_is_answered(harness: RestHarness) -> None:
    answers(harness, '{"lines": 1}')
    events = events_of(harness, RECORDED)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    (message,) = events[-1]["response"]["output"]
    assert (events[-1]["type"], message["content"][0]["text"]) == ("response.completed", '{"lines": 1}')
    prompt = last_prompt(harness)
    assert "<|im_start|>system\nYou are a coding agent.<|im_end|>\n<|im_start|>user\nThe goal?<|im_end|>" in prompt
    assert '{"name": "get_goal", "arguments": {}}' in prompt
    assert '<|im_start|>tool\n{"goal":null}<|im_end|>' in prompt
    assert "multi_agent_v1__wait_agent" in prompt
    grammar = harness.engine.submitted[-1].params.structured_outputs
    assert grammar is not None
    assert grammar.kind == "structural_tag"  # calls, or the schema


def test_a_conversation_goes_on_from_its_last_response(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, CALLS)
    first = client.responses.create(model="demo", input=QUESTION, tools=TOOLS, instructions="First.")
    answers(harness, "It is warm.")
    outputs: list[Any] = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "20 degrees"}
        for item in first.output
        if item.type == "function_call"
    ]
    second = client.responses.create(
        model="demo", input=outputs, tools=TOOLS, previous_response_id=first.id, instructions="Second."
    )
    assert second.output_text == "It is warm."
    prompt = last_prompt(harness)
    assert "First." not in prompt  # instructions are those of the request
    assert (
        prompt.index("Second.")
        < prompt.index(QUESTION)
        < prompt.index('"city": "Rome 🙂"')
        < prompt.index("20 degrees")
    )
    assert client.responses.retrieve(first.id).id == first.id
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="send the whole input"):
        client.responses.create(model="demo", input="And?", previous_response_id=first.id)


def test_what_is_not_stored_cannot_be_continued(client: openai.OpenAI) -> None:
    response = client.responses.create(model="demo", input=QUESTION, store=False, max_output_tokens=1)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_max_output_tokens_is_a_bound(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, "fine")
    assert client.responses.create(model="demo", input=QUESTION, max_output_tokens=10**6).output_text == "fine"


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"input": [{"role": "robot", "content": "x"}]}, 400, "robot"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input_image"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "item_reference"),
        ({"input": [{"type": "function_call", "name": 1}]}, 400, "function_call"),
        ({"input": []}, 400, "messages"),
        ({"input": 3}, 400, "input"),
        ({"tools": [{"type": "function"}]}, 400, "name"),
        ({"background": True}, 400, "background"),
        ({"truncation": "auto"}, 400, "truncation"),
        ({"previous_response_id": "resp_x"}, 404, "resp_x"),
        ({"reasoning": {"effort": "extreme"}}, 400, "reasoning_effort"),
        ({"model": "other"}, 404, "other"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    harness: RestHarness, fields: dict[str, Any], status: int, named: str
) -> None:
    for stream in (False, True):
        response = harness.client.post("/v1/responses", json={"input": QUESTION, "stream": stream, **fields})
        assert response.status_code == status
        assert named in response.json()["error"]["message"]


def test_a_failure_in_a_stream_is_an_event(harness: RestHarness) -> None:
    harness.engine.fail_after = (3, ErrorKind.INTERNAL)
    last = events_of(harness, {"input": QUESTION})[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "failed as asked"}


def test_the_store_is_bounded_in_bytes_and_time() -> None:
    now = 0.0
    all_responses = ResponseStore(2000, clock=lambda: now)
    store = all_responses.of("somebody")
    for number in range(10):
        store.put({"id": f"r{number}"}, [{"role": "user", "content": "x" * 500}])
    with pytest.raises(ModelNotFoundError):
        store.get("r6")
    assert store.get("r9")[1][0]["content"] == "x" * 500
    store.put({"id": "large"}, [{"content": "x" * 3000}])
    with pytest.raises(ModelNotFoundError):
        store.get("large")
    store.get("r7")  # used again, so r8 goes first
    store.put({"id": "next"}, [{"content": "x" * 500}])
    store.get("r7")
    with pytest.raises(ModelNotFoundError):
        store.get("r8")
    now = 3601.0
    with pytest.raises(ModelNotFoundError):
        store.get("r9")


def test_a_tenant_sees_its_own_responses_only() -> None:
    store = ResponseStore(10_000)
    store.of("one").put({"id": "r"}, [])
    with pytest.raises(ModelNotFoundError):
        store.of("other").get("r")
    with pytest.raises(ModelNotFoundError):
        store.of("other").delete("r")
    assert store.of("one").get("r") == ({"id": "r"}, [])
