"""`litellm`: as `openai/…`, `hosted_vllm/…`, `anthropic/…` and text completion; streams, tools, JSON schema, errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
from common import PERSON, SUM, SUM_ANSWER, WEATHER, WEATHER_DESCRIPTION, Server
from pydantic import BaseModel

server = Server()
litellm.telemetry = False
OPENAI: dict[str, Any] = {"model": f"openai/{server.model}", "api_base": server.openai_url, "api_key": "none"}
VLLM: dict[str, Any] = {**OPENAI, "model": f"hosted_vllm/{server.model}"}
ANTHROPIC: dict[str, Any] = {"model": f"anthropic/{server.model}", "api_base": server.url, "api_key": "none"}
LIMITS: dict[str, Any] = {"temperature": 0, "max_tokens": 400, "num_retries": 0}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": WEATHER_DESCRIPTION,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Person(BaseModel):
    name: str
    age: int


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


for provider in (OPENAI, VLLM, ANTHROPIC):
    answer = litellm.completion(**provider, **LIMITS, messages=ask(SUM))
    server.says(answer.choices[0].message.content, SUM_ANSWER)
    assert answer.usage.completion_tokens > 0
    pieces = list(litellm.completion(**provider, **LIMITS, messages=ask(SUM), stream=True))
    server.says("".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices), SUM_ANSWER)
    one_call = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    called = litellm.completion(**provider, **LIMITS, messages=ask(WEATHER), **one_call)
    (call,) = called.choices[0].message.tool_calls
    server.says(json.loads(call.function.arguments)["city"], "Rome")

parsed = litellm.completion(**OPENAI, **LIMITS, messages=ask(PERSON), response_format=Person)
person = json.loads(parsed.choices[0].message.content)
server.is_person(person["name"], person["age"])

text = litellm.text_completion(
    model=f"text-completion-openai/{server.model}",
    api_base=server.openai_url,
    api_key="none",
    prompt="Once upon",
    max_tokens=8,
)
assert text.choices[0].text

response = litellm.responses(**OPENAI, input=SUM, temperature=0, max_output_tokens=400)
server.says(response.output[0].content[0].text, SUM_ANSWER)

try:
    litellm.completion(**OPENAI, messages=ask("a " * 100_000), max_tokens=1, num_retries=0)
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("a prompt that does not fit was taken")


async def asynchronous() -> None:
    answers = await asyncio.gather(*(litellm.acompletion(**OPENAI, **LIMITS, messages=ask(SUM)) for _ in "abc"))
    for each in answers:
        server.says(each.choices[0].message.content, SUM_ANSWER)


asyncio.run(asynchronous())
