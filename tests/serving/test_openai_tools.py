"""Tool calls and reasoning over /v1/chat/completions, with OpenAI's client and an engine whose answers are written here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from pagoda.serving.openai.types import ChatCompletionResponse
from tests.support.rest_harness import RestHarness, harness_with_template

# ChatML with tools, as hermes and Qwen have it, written for these tests.
TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- if reasoning_effort is defined %}{{ 'effort=' + reasoning_effort }}{% endif %}{% endif %}
"""
MESSAGES: list[Any] = [{"role": "user", "content": "How is the weather in Rome?"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
CALLS = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome 🙂", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)
ANSWER = f"<think>\nThe user wants 塔.\n</think>\n\nLet me look.\n{CALLS}"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestHarness]:
    with harness_with_template(TEMPLATE, tmp_path_factory.mktemp("templates")) as running:
        yield running


@pytest.fixture(scope="module")
def client(harness: RestHarness) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=harness.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_script(harness: RestHarness) -> Iterator[None]:
    yield
    harness.engine.script = None


def answers(harness: RestHarness, text: str) -> None:
    harness.engine.script = harness.pool.tokenizer.encode(text, add_special_tokens=False)


def prompt_of(harness: RestHarness, **body: Any) -> str:
    tokens = harness.client.post("/v1/chat/completions", json={"max_tokens": 1, **body})
    assert tokens.status_code == 200, tokens.text
    ids = harness.engine.submitted[-1].prompt_token_ids
    return harness.pool.tokenizer.decode(ids, skip_special_tokens=False)


def test_an_answer_has_content_reasoning_and_calls(harness: RestHarness) -> None:
    answers(harness, ANSWER)
    body = {"messages": MESSAGES, "tools": TOOLS}
    answer = harness.client.post("/v1/chat/completions", json=body).json()
    typed = ChatCompletionResponse.model_validate(answer, strict=True)
    choice = typed.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    assert choice.message.reasoning == choice.message.reasoning_content == "The user wants 塔."
    assert [call.function.name for call in choice.message.tool_calls or []] == ["get_weather", "get_time"]
    arguments = [json.loads(call.function.arguments) for call in choice.message.tool_calls or []]
    assert arguments == [{"city": "Rome 🙂", "days": 2}, {}]
    reasoning = harness.pool.tokenizer.encode("\nThe user wants 塔.\n", add_special_tokens=False)
    assert typed.usage.completion_tokens_details is not None
    assert abs(typed.usage.completion_tokens_details.reasoning_tokens - len(reasoning)) <= 8  # and parts of the markers


def test_a_stream_says_what_the_whole_answer_says(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, ANSWER)
    whole = client.chat.completions.create(model="demo", messages=MESSAGES, tools=TOOLS)
    with client.chat.completions.stream(
        model="demo", messages=MESSAGES, tools=TOOLS, stream_options={"include_usage": True}
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    message, expected = final.choices[0].message, whole.choices[0].message
    assert message.content == expected.content
    assert message.reasoning == expected.reasoning  # type: ignore[attr-defined]
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason == "tool_calls"
    assert final.usage == whole.usage
    streamed, calls = message.tool_calls or [], expected.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in streamed] == [
        (call.function.name, call.function.arguments) for call in calls
    ]
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [event.name for event in done] == ["get_weather", "get_time"]


def test_arguments_come_in_pieces_behind_one_name(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, CALLS)
    stream = client.chat.completions.create(model="demo", messages=MESSAGES, tools=TOOLS, stream=True)
    calls = [call for event in stream for call in event.choices[0].delta.tool_calls or []]
    first = [call for call in calls if call.index == 0]
    assert [call.function.name for call in first if call.function and call.function.name] == ["get_weather"]
    assert len({call.id for call in first if call.id}) == 1
    assert sum(bool(call.function and call.function.arguments) for call in first) > 3
    assert [call.index for call in calls] == sorted(call.index for call in calls)


def test_content_is_null_beside_calls_alone(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, CALLS)
    message = client.chat.completions.create(model="demo", messages=MESSAGES, tools=TOOLS).choices[0].message
    assert message.content is None
    assert message.tool_calls


def test_parse_gives_typed_arguments(harness: RestHarness, client: openai.OpenAI) -> None:
    class get_weather(BaseModel):  # noqa: N801
        city: str
        days: int

    answers(harness, CALLS)
    completion = client.chat.completions.parse(
        model="demo", messages=MESSAGES, tools=[openai.pydantic_function_tool(get_weather)]
    )
    calls = completion.choices[0].message.tool_calls or []
    assert [call.function.parsed_arguments for call in calls] == [get_weather(city="Rome 🙂", days=2)]
    # A function that was not offered is no call.
    assert '"get_time"' in (completion.choices[0].message.content or "")


@pytest.mark.parametrize("arguments", [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}])
def test_without_tools_nothing_is_a_call(harness: RestHarness, client: openai.OpenAI, arguments: Any) -> None:
    answers(harness, CALLS)
    choice = client.chat.completions.create(model="demo", messages=MESSAGES, **arguments).choices[0]
    assert choice.message.content == CALLS
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


def test_a_marker_in_prose_stays_prose(harness: RestHarness, client: openai.OpenAI) -> None:
    text = "Write `<tool_call>` before a call and </tool_call> behind it; <think> is for thoughts."
    answers(harness, text)
    choice = client.chat.completions.create(model="demo", messages=MESSAGES, tools=TOOLS).choices[0]
    assert choice.message.content == text
    assert choice.finish_reason == "stop"


def test_a_call_that_is_cut_off_has_the_arguments_so_far(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, CALLS)
    cut = len(harness.pool.tokenizer.encode(CALLS[: CALLS.index("days")], add_special_tokens=False))
    choice = client.chat.completions.create(model="demo", messages=MESSAGES, tools=TOOLS, max_tokens=cut).choices[0]
    assert choice.finish_reason == "length"
    (call,) = choice.message.tool_calls or []
    assert call.function.arguments.startswith('{"city": "Rome')


def test_without_parallel_calls_the_first_one_ends_the_answer(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, CALLS + "\nmore")
    choice = client.chat.completions.create(
        model="demo", messages=MESSAGES, tools=TOOLS, parallel_tool_calls=False
    ).choices[0]
    assert [call.function.name for call in choice.message.tool_calls or []] == ["get_weather"]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert harness.engine.aborted[-1] == harness.engine.submitted[-1].request_id


def test_reasoning_can_be_left_out(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, ANSWER)
    create = client.chat.completions.create
    message = create(model="demo", messages=MESSAGES, extra_body={"include_reasoning": False}).choices[0].message
    assert not hasattr(message, "reasoning")
    assert message.content == f"Let me look.\n{CALLS}"


def test_reasoning_that_is_cut_off_is_reasoning(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, "<think>\nlong thoughts without an end")
    choice = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=20).choices[0]
    assert choice.message.content is None
    assert choice.message.reasoning.startswith("long")  # type: ignore[attr-defined]
    assert choice.finish_reason == "length"


def test_tools_and_history_reach_the_template(harness: RestHarness) -> None:
    history = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "reasoning": "I must look.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "20 degrees"}]},
    ]
    prompt = prompt_of(harness, messages=history, tools=TOOLS)
    assert '"name": "get_weather", "description"' in prompt
    assert "<think>\nI must look.\n</think>" in prompt
    assert '{"name": "get_weather", "arguments": {"city": "Rome"}}' in prompt
    assert "<|im_start|>tool\n20 degrees<|im_end|>" in prompt


@pytest.mark.parametrize("arguments", ["", "{", "[1]", None, {"a": 1}])
def test_any_arguments_in_the_history_can_be_rendered(harness: RestHarness, arguments: Any) -> None:
    call = {"id": "c1", "function": {"name": "f", "arguments": arguments}}
    history = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "no"}]
    assert '"name": "f"' in prompt_of(harness, messages=history)


def test_effort_and_thinking_reach_the_template(harness: RestHarness) -> None:
    assert prompt_of(harness, messages=MESSAGES, reasoning_effort="low").endswith("effort=low")
    for fields in ({"reasoning_effort": "none"}, {"enable_thinking": False}):
        assert prompt_of(harness, messages=MESSAGES, **fields).endswith("<think>\n\n</think>\n\n")
    assert prompt_of(
        harness, messages=MESSAGES, reasoning_effort="high", chat_template_kwargs={"enable_thinking": False}
    ).endswith("</think>\n\neffort=high")


def test_a_thinking_budget_reaches_the_engine(harness: RestHarness) -> None:
    def asked(**fields: Any) -> Any:
        prompt_of(harness, messages=MESSAGES, **fields)
        return harness.engine.submitted[-1].params.structured_outputs

    spec = asked(thinking_token_budget=12)
    assert (spec.kind, spec.reasoning_budget) == ("text", 12)
    assert harness.pool.tokenizer.decode(spec.starts_after, skip_special_tokens=False) == "</think>"
    for fields in ({}, {"thinking_token_budget": -1}, {"thinking_token_budget": 5, "enable_thinking": False}):
        assert asked(**fields) is None
    body = {"model": "demo", "max_tokens": 40, "messages": MESSAGES}
    for thinking, budget in (
        ({"type": "enabled", "budget_tokens": 30}, 30),
        ({"type": "enabled"}, None),
        ({"type": "adaptive"}, None),
    ):
        assert harness.client.post("/v1/messages", json={**body, "thinking": thinking}).status_code == 200
        spec = harness.engine.submitted[-1].params.structured_outputs
        assert (spec and spec.reasoning_budget) == budget


def test_an_answer_after_closed_reasoning_is_content(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, "plain")
    choice = client.chat.completions.create(
        model="demo", messages=MESSAGES, extra_body={"enable_thinking": False}
    ).choices[0]
    assert choice.message.content == "plain"


def test_n_answers_have_calls_of_their_own(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, CALLS)
    choices = client.chat.completions.create(model="demo", messages=MESSAGES, tools=TOOLS, n=2).choices
    ids = {call.id for choice in choices for call in choice.message.tool_calls or []}
    assert len(ids) == 4


def test_a_stop_string_ends_within_a_call(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, CALLS)
    choice = client.chat.completions.create(
        model="demo", messages=MESSAGES, tools=TOOLS, stop=["</tool_call>"]
    ).choices[0]
    assert [call.function.name for call in choice.message.tool_calls or []] == ["get_weather"]
    assert choice.stop_reason == "</tool_call>"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "two functions"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_tim"}}}, "get_tim"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [1]}}}, "allowed_tools"),
        ({"reasoning_effort": "extreme"}, "none, minimal"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"thinking_token_budget": 1.5}, "thinking_token_budget"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "tool_calls"),
    ],
)
def test_what_cannot_be_is_refused_by_name(harness: RestHarness, fields: dict[str, Any], named: str) -> None:
    response = harness.client.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
    assert response.status_code == 400
    assert named in response.json()["error"]["message"]


def test_only_allowed_tools_are_called(harness: RestHarness, client: openai.OpenAI) -> None:
    answers(harness, CALLS)
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    choice = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},  # type: ignore[arg-type]
    ).choices[0]
    assert [call.function.name for call in choice.message.tool_calls or []] == ["get_time"]
