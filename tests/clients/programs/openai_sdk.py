"""The `openai` package: chats, its helpers for parsing and streaming, completions, responses, models."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
from common import PERSON, SUM, SUM_ANSWER, WEATHER, WEATHER_ANSWER, WEATHER_DESCRIPTION, WEATHER_RESULT, Server
from pydantic import BaseModel

server = Server()
client = openai.OpenAI(base_url=server.openai_url, api_key="none", max_retries=0)
model: Any = server.model


class Person(BaseModel):
    name: str
    age: int


class get_weather(BaseModel):  # noqa: N801 (the tool's name)
    """Weather of a city"""

    city: str


def ask(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chats() -> None:
    answer = client.chat.completions.create(
        model=model, messages=ask(SUM), temperature=0, max_tokens=400, logprobs=True
    )
    server.says(answer.choices[0].message.content, SUM_ANSWER)
    assert answer.choices[0].logprobs is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 0

    with client.chat.completions.stream(
        model=model, messages=ask(SUM), temperature=0, max_tokens=400, stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type for event in stream}
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    final = stream.get_final_completion()
    server.says(final.choices[0].message.content, SUM_ANSWER)
    assert final.usage is not None


def parsing() -> None:
    parsed = client.chat.completions.parse(
        model=model, messages=ask(PERSON), response_format=Person, temperature=0, max_tokens=400
    )
    person = parsed.choices[0].message.parsed
    assert person is not None
    server.is_person(person.name, person.age)
    with client.chat.completions.stream(
        model=model, messages=ask(PERSON), response_format=Person, temperature=0, max_tokens=400
    ) as stream:
        person = stream.get_final_completion().choices[0].message.parsed
    assert person is not None
    server.is_person(person.name, person.age)


def tools() -> None:
    tool = openai.pydantic_function_tool(get_weather, description=WEATHER_DESCRIPTION)
    messages = ask(WEATHER)
    asked: Any = {"model": model, "tools": [tool], "temperature": 0, "max_tokens": 400}
    one_call: Any = {"tool_choice": "required", "parallel_tool_calls": False}
    answer = client.chat.completions.parse(**asked, **one_call, messages=messages)
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, get_weather)
    server.says(call.function.parsed_arguments.city, "Rome")
    with client.chat.completions.stream(**asked, **one_call, messages=messages) as stream:
        events = [event.type for event in stream]
    assert "tool_calls.function.arguments.done" in events, events
    (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments
    messages += [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": WEATHER_RESULT}]
    answer = client.chat.completions.parse(**asked, messages=messages)
    server.says(answer.choices[0].message.content, WEATHER_ANSWER)


def completions() -> None:
    answer = client.completions.create(model=model, prompt=["Once upon", "Far away"], max_tokens=8, logprobs=2, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    stream = client.completions.create(model=model, prompt="Once upon", max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in stream)


def responses() -> None:
    answer = client.responses.create(model=model, input=SUM, temperature=0, max_output_tokens=400)
    server.says(answer.output_text, SUM_ANSWER)
    further = client.responses.create(model=model, input=SUM, previous_response_id=answer.id, max_output_tokens=8)
    assert further.previous_response_id == answer.id
    with client.responses.stream(model=model, input=SUM, temperature=0, max_output_tokens=400) as stream:
        kinds = [event.type for event in stream]
        server.says(stream.get_final_response().output_text, SUM_ANSWER)
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    parsed = client.responses.parse(
        model=model, input=PERSON, text_format=Person, temperature=0, max_output_tokens=400
    ).output_parsed
    assert parsed is not None
    server.is_person(parsed.name, parsed.age)
    tool: Any = {
        "type": "function",
        "name": "get_weather",
        "description": WEATHER_DESCRIPTION,
        "parameters": get_weather.model_json_schema(),
        "strict": False,
    }
    called = client.responses.create(
        model=model,
        input=WEATHER,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_output_tokens=400,
    )
    (call,) = (item for item in called.output if item.type == "function_call")
    server.says(json.loads(call.arguments)["city"], "Rome")


def errors() -> None:
    assert [each.id for each in client.models.list()] == [server.model]
    create: Any = client.chat.completions.create
    asked = {"model": model, "messages": ask("a"), "max_tokens": 1}
    for wrong, status in (({"temperature": 9e9}, 400), ({"model": "none"}, 404)):
        answered = 200
        try:
            create(**{**asked, **wrong})
        except openai.APIStatusError as error:
            answered = error.status_code
        assert answered == status, wrong


async def asynchronous() -> None:
    async with openai.AsyncOpenAI(base_url=server.openai_url, api_key="none") as others:
        answers = await asyncio.gather(
            *(
                others.chat.completions.create(model=model, messages=ask(SUM), temperature=0, max_tokens=400)
                for _ in "abc"
            )
        )
    for answer in answers:
        server.says(answer.choices[0].message.content, SUM_ANSWER)


chats()
parsing()
tools()
completions()
responses()
errors()
asyncio.run(asynchronous())
