"""Structured outputs over every protocol, from a real server with the demo model."""

from __future__ import annotations

import concurrent.futures
import json
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pydantic
import pytest

import pagoda
from tests.support.child_processes import children_running
from tests.support.server import ServerProcess

CHAT, COMPLETIONS, INFER = "/v1/chat/completions", "/v1/completions", "/v2/models/demo/infer"
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me about Anna."}]


class Person(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=10)
    age: int = pydantic.Field(ge=0, le=150)
    colors: list[str] = pydantic.Field(max_length=1)


SCHEMA = Person.model_json_schema()
SCHEMA["properties"]["colors"]["items"] = {"enum": ["red", "green"]}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    from pathlib import Path

    model = Path(pagoda.__file__).parent / "demo_model"
    with ServerProcess(model=model, max_model_len=512, structured_outputs_timeout_seconds=2) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_openais_parse_gives_the_object(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Person, max_tokens=300, temperature=0.8, seed=5
    )
    choice = parsed.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Person)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_holds_for_every_choice_and_in_a_stream(client: openai.OpenAI, stream: bool) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        n=4,
        temperature=1.5,
        max_tokens=300,
        stream=stream,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": SCHEMA}},
    )
    texts, reasons = [""] * 4, [""] * 4
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert reasons == ["stop"] * 4
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_holds_beside_tools(client: openai.OpenAI, stream: bool) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        n=4,
        temperature=1.5,
        max_tokens=300,
        stream=stream,
        tools=[{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
        parallel_tool_calls=False,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": SCHEMA}},
    )
    texts, reasons = [""] * 4, [""] * 4
    for part in answer if stream else [answer]:
        for choice in part.choices:
            said = choice.delta if stream else choice.message
            texts[choice.index] += said.content or ""
            texts[choice.index] += "".join(call.function.arguments for call in said.tool_calls or [])
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert set(reasons) <= {"stop", "tool_calls"}
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_json_mode_cut_by_its_length_says_so(server: ServerProcess) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "response_format": {"type": "json_object"}}
    choice = server.client.post(CHAT, json=body).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    "asked",
    [
        {"guided_choice": ["red", "green"]},
        {"structured_outputs": {"choice": ["red", "green"]}},
        {"guided_regex": "red|green"},
        {"regex": "red|green"},
        {"guided_grammar": 'start: "red" | "green"'},
        {"guided_json": {"enum": ["red", "green"]}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "c", "schema": {"enum": ["red", "green"]}},
            }
        },
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, INFER])
def test_one_of_two_colors_however_it_is_asked(server: ServerProcess, path: str, asked: dict[str, Any]) -> None:
    if path == INFER:
        body = {
            "inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["A color:"]}],
            "parameters": {
                "max_tokens": 20,
                **{name: value if isinstance(value, str) else json.dumps(value) for name, value in asked.items()},
            },
        }
        outputs = server.client.post(path, json=body).json()["outputs"]
        text = next(output["data"][0] for output in outputs if output["name"] == "text_output")
    else:
        prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "A color:"}
        choice = server.client.post(path, json={**prompt, "max_tokens": 20, **asked}).json()["choices"][0]
        text = choice["message"]["content"] if path == CHAT else choice["text"]
    assert text.strip('"') in ("red", "green")


BAD = {
    "a schema of nothing": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
        "not",
    ),
    "unique items": ({"guided_json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    "a pattern": ({"guided_regex": "(a"}, "regex"),
    "two forms": ({"guided_regex": "a", "guided_choice": ["a"]}, "exclude each other"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "json_schema.schema"),
    "a type": ({"response_format": {"type": "xml"}}, "known are"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_enforced_is_a_400_that_names_it(server: ServerProcess, case: str, stream: bool) -> None:
    asked, words = BAD[case]
    answer = server.client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 5, "stream": stream, **asked})
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_a_hostile_schema_is_a_400_and_others_are_served_meanwhile(server: ServerProcess) -> None:
    hostile = {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (101, 103, 107, 109)]}
    body = {"messages": MESSAGES, "max_tokens": 5, "guided_json": hostile}
    plain = {"messages": MESSAGES, "max_tokens": 2, "guided_choice": ["red", "green"]}
    with concurrent.futures.ThreadPoolExecutor() as threads:
        refused = threads.submit(server.client.post, CHAT, json=body)
        while not refused.done():
            assert server.client.post(CHAT, json=plain).status_code == 200
            time.sleep(0.05)
        assert refused.result().status_code == 400
        assert "took longer than 2 s" in refused.result().json()["error"]["message"]
    assert len(children_running("pagoda.structured.compile_process", server.process.pid, recursive=True)) <= 2
