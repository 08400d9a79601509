"""`openai-agents`: agents with tools and typed output over chats and Responses, whole and streamed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from common import PERSON, SUM, SUM_ANSWER, WEATHER, WEATHER_ANSWER, WEATHER_DESCRIPTION, WEATHER_RESULT, Server
from openai import AsyncOpenAI
from pydantic import BaseModel

server = Server()
set_tracing_disabled(True)
client = AsyncOpenAI(base_url=server.openai_url, api_key="none", max_retries=0)
settings = ModelSettings(temperature=0, max_tokens=400)


class Person(BaseModel):
    name: str
    age: int


@function_tool(description_override=WEATHER_DESCRIPTION)
def get_weather(city: str) -> str:
    return WEATHER_RESULT


async def main() -> None:
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(server.model, client)
        plain = Agent(name="plain", model=model, model_settings=settings)
        server.says((await Runner.run(plain, SUM)).final_output, SUM_ANSWER)
        streamed = Runner.run_streamed(plain, SUM)
        num_events = 0
        async for _ in streamed.stream_events():
            num_events += 1
        assert num_events > 3
        server.says(streamed.final_output, SUM_ANSWER)
        forced = Agent(
            name="forced",
            model=model,
            model_settings=replace(settings, tool_choice="required", parallel_tool_calls=False),
            tools=[get_weather],
            tool_use_behavior="stop_on_first_tool",
        )
        assert (await Runner.run(forced, WEATHER)).final_output == WEATHER_RESULT
        if server.is_demo:  # of another model it is not known whether it calls the tool, and stops calling it
            with_tool = Agent(name="tools", model=model, model_settings=settings, tools=[get_weather])
            result = await Runner.run(with_tool, WEATHER)
            assert [item.type for item in result.new_items][:2] == ["tool_call_item", "tool_call_output_item"]
            server.says(result.final_output, WEATHER_ANSWER)
        typed = Agent(name="typed", model=model, model_settings=settings, output_type=Person)
        person = (await Runner.run(typed, PERSON)).final_output
        server.is_person(person.name, person.age)


asyncio.run(main())
