"""`pydantic-ai`: agents over chats, Responses and Messages; tools, typed output by tool and by schema, streams."""

from __future__ import annotations

import asyncio

from anthropic import AsyncAnthropic
from common import PERSON, SUM, SUM_ANSWER, WEATHER, WEATHER_ANSWER, WEATHER_DESCRIPTION, WEATHER_RESULT, Server
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, Tool
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

server = Server()
provider = OpenAIProvider(base_url=server.openai_url, api_key="none")
settings = ModelSettings(temperature=0, max_tokens=400)
chat = OpenAIChatModel(server.model, provider=provider, settings=settings)
responses = OpenAIResponsesModel(server.model, provider=provider, settings=settings)
messages = AnthropicModel(
    server.model,
    provider=AnthropicProvider(anthropic_client=AsyncAnthropic(base_url=server.url, api_key="none")),
    settings=settings,
)


class Person(BaseModel):
    """A person"""

    name: str
    age: int


def get_weather(city: str) -> str:
    return WEATHER_RESULT


async def main() -> None:
    for model in (chat, responses, messages):
        server.says((await Agent(model).run(SUM)).output, SUM_ANSWER)
        async with Agent(model).run_stream(SUM) as streamed:
            server.says(await streamed.get_output(), SUM_ANSWER)
        assert (await Agent(model, output_type=get_weather).run(WEATHER)).output == WEATHER_RESULT  # it must be called
        if server.is_demo:  # of another model it is not known whether it calls the tool, and stops calling it
            tool = Tool(get_weather, name="get_weather", description=WEATHER_DESCRIPTION)
            server.says((await Agent(model, tools=[tool]).run(WEATHER)).output, WEATHER_ANSWER)
        assert isinstance((await Agent(model, output_type=Person).run(PERSON)).output, Person)
    for model in (chat, responses):
        person = (await Agent(model, output_type=NativeOutput(Person)).run(PERSON)).output
        server.is_person(person.name, person.age)


asyncio.run(main())
