"""Ollama's routes with Ollama's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from pagoda.errors import ErrorKind
from tests.serving.test_openai_tools import ANSWER, CALLS, TEMPLATE
from tests.support.rest_harness import RestHarness, harness_with_template

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
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestHarness]:
    with harness_with_template(TEMPLATE, tmp_path_factory.mktemp("templates")) as running:
        yield running


@pytest.fixture(scope="module")
def client(harness: RestHarness) -> ollama.Client:
    return ollama.Client(host=harness.url, trust_env=False)


@pytest.fixture(autouse=True)
def _no_script(harness: RestHarness) -> Iterator[None]:
    yield
    harness.engine.script = None
    harness.engine.fail_after = None


def answers(harness: RestHarness, text: str) -> None:
    harness.engine.script = harness.pool.tokenizer.encode(text, add_special_tokens=False)


def last_prompt(harness: RestHarness) -> str:
    return harness.pool.tokenizer.decode(harness.engine.submitted[-1].prompt_token_ids, skip_special_tokens=False)


def calls_of(message: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(call.function.name, dict(call.function.arguments)) for call in message.tool_calls or []]


EXPECTED_CALLS = [("get_weather", {"city": "Rome 🙂", "days": 2}), ("get_time", {})]


def test_a_chat_answers_with_thinking_content_and_calls(harness: RestHarness, client: ollama.Client) -> None:
    answers(harness, ANSWER)
    answer = client.chat(model="demo", messages=MESSAGES, tools=TOOLS)
    assert answer.message.thinking == "The user wants 塔."
    assert answer.message.content == "Let me look."
    assert calls_of(answer.message) == EXPECTED_CALLS
    assert (answer.done, answer.done_reason, answer.model) == (True, "stop", "demo")
    submitted = harness.engine.submitted[-1]
    assert answer.prompt_eval_count == len(submitted.prompt_token_ids)
    assert answer.eval_count == len(harness.engine.script or []) + 1
    assert answer.total_duration == answer.prompt_eval_duration + answer.eval_duration  # type: ignore[operator]
    assert answer.load_duration == 0


def test_a_stream_says_what_the_whole_answer_says(harness: RestHarness, client: ollama.Client) -> None:
    answers(harness, ANSWER)
    whole = client.chat(model="demo", messages=MESSAGES, tools=TOOLS)
    parts = list(client.chat(model="demo", messages=MESSAGES, tools=TOOLS, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert "".join(part.message.thinking or "" for part in parts) == whole.message.thinking
    assert [call for part in parts for call in calls_of(part.message)] == EXPECTED_CALLS
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (parts[-1].done_reason, parts[-1].eval_count) == (whole.done_reason, whole.eval_count)


def test_lines_are_json_and_nothing_else(harness: RestHarness) -> None:
    with harness.client.stream("POST", "/api/chat", json={"model": "demo", "messages": MESSAGES}) as response:
        assert response.headers["content-type"] == "application/x-ndjson"
        lines = response.read().decode().split("\n")
    assert lines.pop() == ""
    assert [json.loads(line)["done"] for line in lines][-1] is True


def test_generate_goes_through_the_chat_template_unless_raw(harness: RestHarness, client: ollama.Client) -> None:
    answer = client.generate(model="demo", prompt="Hi", system="Be brief.", options={"num_predict": 3})
    assert last_prompt(harness).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (answer.eval_count, answer.done_reason) == (3, "length")
    submitted = harness.engine.submitted[-1]
    assert list(answer.context or [])[: len(submitted.prompt_token_ids)] == submitted.prompt_token_ids
    client.generate(model="demo", prompt="Hi", raw=True, options={"num_predict": 1})
    assert last_prompt(harness).endswith("Hi")
    assert "im_start" not in last_prompt(harness)
    parts = list(
        client.generate(model="demo", prompt="one two three", raw=True, stream=True, options={"num_predict": 3})
    )
    whole = client.generate(model="demo", prompt="one two three", raw=True, options={"num_predict": 3})
    assert "".join(part.response or "" for part in parts) == whole.response


def test_context_of_an_answer_goes_before_the_next_prompt(harness: RestHarness, client: ollama.Client) -> None:
    first = client.generate(model="demo", prompt="one", raw=True, options={"num_predict": 2})
    client.generate(model="demo", prompt="two", raw=True, context=first.context, options={"num_predict": 1})
    prompt = harness.engine.submitted[-1].prompt_token_ids
    context = list(first.context or [])
    assert prompt[: len(context)] == context
    assert harness.pool.tokenizer.decode(prompt[len(context) :]).strip() == "two"


def test_options_become_sampling_parameters(harness: RestHarness, client: ollama.Client) -> None:
    options: dict[str, Any] = {
        **{"num_predict": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 5, "stop": ["zzz"]},
        **{"repeat_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": 0.125},
        **{"num_ctx": 8192, "num_gpu": 1, "num_thread": 4, "mirostat": 0, "typical_p": 1.0},  # change nothing
    }
    client.chat(model="demo", messages=MESSAGES, options=options)
    submitted = harness.engine.submitted[-1]
    params = submitted.params
    assert submitted.max_tokens == 7
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.seed) == (0.5, 3, 0.9, 0.1, 5)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.5, 0.25, 0.125)
    assert params.stop == ("zzz",)
    client.chat(
        model="demo",
        messages=MESSAGES,
        options={"num_predict": -1, "seed": -1, "repeat_penalty": 2, "repeat_last_n": 0},
    )
    submitted = harness.engine.submitted[-1]
    assert submitted.num_prompt_tokens + submitted.max_tokens == 4096
    assert (submitted.params.seed, submitted.params.repetition_penalty) == (None, 1.0)


@pytest.mark.parametrize(("form", "kind"), [("json", "json_object"), (SCHEMA, "json_schema")])
def test_format_is_a_grammar(harness: RestHarness, client: ollama.Client, form: Any, kind: str) -> None:
    answers(harness, '{"name": "x"}')
    client.chat(model="demo", messages=MESSAGES, format=form)
    grammar = harness.engine.submitted[-1].params.structured_outputs
    assert grammar is not None
    assert grammar.kind == kind


@pytest.mark.parametrize(
    ("think", "end"), [(False, "<think>\n\n</think>\n\n"), (True, "assistant\n"), ("high", "effort=high")]
)
def test_think_reaches_the_template(harness: RestHarness, client: ollama.Client, think: Any, end: str) -> None:
    client.chat(model="demo", messages=MESSAGES, think=think, options={"num_predict": 1})
    assert last_prompt(harness).endswith(end)


def test_a_conversation_with_calls_and_results(harness: RestHarness, client: ollama.Client) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    history: list[Any] = [
        *MESSAGES,
        {"role": "assistant", "content": "Looking.", "thinking": "I must look.", "tool_calls": [call]},
        {"role": "tool", "content": "20 degrees", "tool_name": "get_weather"},
    ]
    client.chat(model="demo", messages=history, tools=TOOLS, options={"num_predict": 1})
    prompt = last_prompt(harness)
    for part in (
        "<think>\nI must look.\n</think>\n\nLooking.\n<tool_call>",
        '{"name": "get_weather", "arguments": {"city": "Rome"}}',
        "<|im_start|>tool\n20 degrees<|im_end|>",
    ):
        assert part in prompt


def test_a_call_that_is_cut_off_has_what_there_is(harness: RestHarness, client: ollama.Client) -> None:
    answers(harness, CALLS)
    cut = len(harness.pool.tokenizer.encode(CALLS[: CALLS.index(', "days')], add_special_tokens=False))
    for stream in (False, True):
        answer: Any = client.chat(
            model="demo", messages=MESSAGES, tools=TOOLS, options={"num_predict": cut}, stream=stream
        )
        parts = list(answer) if stream else [answer]
        ((name, arguments),) = [call for part in parts for call in calls_of(part.message)]
        assert name == "get_weather"
        assert arguments in ({}, {"city": "Rome 🙂"})
        assert parts[-1].done_reason == "length"


def test_logprobs(harness: RestHarness, client: ollama.Client) -> None:
    answer = client.chat(model="demo", messages=MESSAGES, logprobs=True, top_logprobs=2, options={"num_predict": 2})
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 2
    raw = client.generate(model="demo", prompt="a", raw=True, logprobs=True, top_logprobs=2, options={"num_predict": 2})
    assert raw.logprobs is not None
    assert [len(entry.top_logprobs or []) for entry in raw.logprobs] == [2, 2]


def test_the_model_is_listed_shown_and_running(client: ollama.Client) -> None:
    (listed,) = client.list().models
    assert listed.model == "demo:latest"
    assert len(listed.digest or "") == 64
    assert (listed.size or 0) > 1000
    assert listed.details is not None
    assert (listed.details.format, listed.details.family) == ("safetensors", "qwen3")
    (running,) = client.ps().models
    assert (running.model, running.context_length, running.size_vram) == ("demo:latest", 4096, 0)
    shown = client.show("demo")
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "qwen3"
    assert shown.modelinfo["qwen3.context_length"] == 4096
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.template == ""


def test_a_name_may_end_in_latest(client: ollama.Client) -> None:
    assert client.chat(model="demo:latest", messages=MESSAGES, options={"num_predict": 1}).model == "demo"
    assert client.show("demo:latest").capabilities


def test_loading_is_answered_and_unloading_refused(harness: RestHarness, client: ollama.Client) -> None:
    before = len(harness.engine.submitted)
    assert client.generate(model="demo").done_reason == "load"
    assert client.chat(model="demo", messages=[]).done_reason == "load"
    with pytest.raises(ollama.ResponseError, match="lives as long as the server"):
        client.generate(model="demo", keep_alive=0)
    assert len(harness.engine.submitted) == before
    client.generate(model="demo", prompt="x", keep_alive=0, options={"num_predict": 1})


def test_the_version_is_one_that_clients_accept(harness: RestHarness) -> None:
    version = harness.client.get("/api/version").json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4)


@pytest.mark.parametrize(
    ("path", "fields", "status", "named"),
    [
        ("chat", {"model": "other", "messages": MESSAGES}, 404, "other"),
        ("show", {"model": "other"}, 404, "other"),
        ("show", {}, 400, "model"),
        ("chat", {"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aaaa"]}]}, 400, "images"),
        ("chat", {"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content"),
        ("chat", {"messages": MESSAGES, "options": {"mirostat": 2}}, 400, "options.mirostat"),
        ("chat", {"messages": MESSAGES, "options": {"num_predict": "x"}}, 400, "options.num_predict"),
        ("chat", {"messages": MESSAGES, "options": {"top_p": 3}}, 400, "top_p"),
        ("chat", {"messages": MESSAGES, "format": "xml"}, 400, "format"),
        ("chat", {"messages": MESSAGES, "think": "a lot"}, 400, "reasoning_effort"),
        ("generate", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, 400, "template"),
        ("generate", {"prompt": "x", "images": ["aaaa"]}, 400, "images"),
        ("generate", {"prompt": "x", "context": [1] * 5000}, 400, "context"),
        ("generate", {"prompt": "x", "context": ["a"]}, 400, "context"),
        ("generate", {"prompt": "x", "raw": True, "system": "y"}, 400, "system"),
    ],
)
def test_errors_say_what_is_wrong(
    harness: RestHarness, path: str, fields: dict[str, Any], status: int, named: str
) -> None:
    response = harness.client.post(f"/api/{path}", json={"stream": False, **fields})
    assert response.status_code == status, response.text
    assert named in response.json()["error"]


def test_an_error_in_a_stream_is_its_last_line(harness: RestHarness, client: ollama.Client) -> None:
    harness.engine.fail_after = (3, ErrorKind.INTERNAL)
    with pytest.raises(ollama.ResponseError, match="failed as asked"):
        list(client.chat(model="demo", messages=MESSAGES, stream=True))


def test_a_model_without_chat_template_completes_prompts(tmp_path_factory: pytest.TempPathFactory) -> None:
    from pagoda.models.dummy import DummySpec, write_dummy_checkpoint

    directory = write_dummy_checkpoint(tmp_path_factory.mktemp("plain") / "model", DummySpec(chat_template=False))
    with RestHarness(checkpoint=str(directory)) as harness:
        answer = harness.client.post("/api/generate", json={"prompt": "one two", "stream": False}).json()
        assert answer["done"] is True
        prompt = last_prompt(harness)
    assert prompt.endswith("one two")
