"""`pagoda serve` with the demo model: what users first see, over REST."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pagoda.models.checkpoint_source import demo_checkpoint
from tests.support.demo_questions import IDENTITY, WEATHER_TOOL, FactSheet, ask
from tests.support.server import ServerProcess


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    settings = {"kv_cache_memory_bytes": "64MiB", "dtype": "float32", "max_num_batched_tokens": 256}
    with ServerProcess(model=demo_checkpoint(), **settings) as running:
        running.wait_until_ready()
        yield running


def chat(server: ServerProcess, messages: list[dict[str, str]], **options: Any) -> dict[str, Any]:
    body = {"model": "demo", "messages": messages, "temperature": 0, **options}
    response = server.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_chat_says_who_it_is(server: ServerProcess) -> None:
    choice = chat(server, ask("Who are you?"))["choices"][0]
    assert choice["message"]["content"] == IDENTITY
    assert choice["finish_reason"] == "stop"


def test_streamed_text_joins_to_the_same_answer(server: ServerProcess) -> None:
    body = {"model": "demo", "messages": ask("Repeat: river lamp fox stone"), "temperature": 0, "stream": True}
    pieces = []
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                pieces += [choice["delta"].get("content") or "" for choice in json.loads(line[6:])["choices"]]
    assert "".join(pieces) == "river lamp fox stone"


def test_a_long_prompt_is_recalled_through_the_server_and_its_prefix_reused(server: ServerProcess) -> None:
    sheet = FactSheet.draw(21, 170)
    for position in (12, 150):
        messages, expected = sheet.ask(position)
        assert chat(server, messages)["choices"][0]["message"]["content"] == expected


def test_json_over_the_v2_generate_route_parses(server: ServerProcess) -> None:
    prompt = (
        "<|im_start|>system\nYou are Pagoda's built-in demo model.<|im_end|>\n<|im_start|>user\n"
        "Mia is 34 years old and lives in Oslo. Answer in JSON with name, age.<|im_end|>\n<|im_start|>assistant\n"
    )
    body = {"text_input": prompt, "parameters": {"temperature": 0, "max_tokens": 60}}
    response = server.client.post("/v2/models/demo/generate", json=body)
    assert json.loads(response.json()["text_output"]) == {"name": "Mia", "age": 34}


def test_an_offered_tool_is_called_and_its_result_told(server: ServerProcess) -> None:
    messages: list[dict[str, Any]] = [*ask("What is the weather in Rome?")]
    choice = chat(server, messages, tools=[WEATHER_TOOL])["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    messages += [choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "21 degrees"}]
    choice = chat(server, messages, tools=[WEATHER_TOOL])["choices"][0]
    assert choice["message"]["content"] == "It is 21 degrees in Rome."
    assert choice["finish_reason"] == "stop"


ALARM_TOOL = {
    "type": "function",
    "function": {
        "name": "set_alarm",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"hour": {"type": "integer", "minimum": 1, "maximum": 12}, "loud": {"enum": ["yes", "no"]}},
            "required": ["hour", "loud"],
            "additionalProperties": False,
        },
    },
}


def test_a_call_that_must_be_is_valid_whatever_was_asked(server: ServerProcess) -> None:
    named = {"type": "function", "function": {"name": "set_alarm"}}
    for choice, names in (("required", {"get_weather", "set_alarm"}), (named, {"set_alarm"})):
        body = {"messages": ask("Who are you?"), "tools": [WEATHER_TOOL, ALARM_TOOL], "tool_choice": choice}
        for seed in range(4):
            made = server.client.post("/v1/chat/completions", json={**body, "seed": seed, "max_tokens": 200})
            assert made.status_code == 200, made.text
            answer = made.json()["choices"][0]
            assert answer["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
            assert answer["message"]["content"] is None
            for call in answer["message"]["tool_calls"]:
                arguments = json.loads(call["function"]["arguments"])
                assert call["function"]["name"] in names
                if call["function"]["name"] == "set_alarm":
                    assert 1 <= arguments["hour"] <= 12
                    assert arguments["loud"] in ("yes", "no")


def test_a_strict_tool_leaves_text_free(server: ServerProcess) -> None:
    tools = [{"type": "function", "function": {**WEATHER_TOOL["function"], "strict": True}}]
    choice = chat(server, ask("What is the weather in Rome?"), tools=tools)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    choice = chat(server, ask("Who are you?"), tools=tools)["choices"][0]
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "stop"


def test_a_story_is_completed(server: ServerProcess) -> None:
    body = {"model": "demo", "prompt": "Once upon", "temperature": 0, "max_tokens": 40}
    text = server.client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert text.startswith(" a time")
