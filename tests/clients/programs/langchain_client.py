"""`langchain-openai`: invoke, stream, batch, tools, structured output by schema and by a tool."""

from __future__ import annotations

from common import PERSON, SUM, SUM_ANSWER, WEATHER, WEATHER_ANSWER, WEATHER_DESCRIPTION, WEATHER_RESULT, Server
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, SecretStr

server = Server()
model = ChatOpenAI(
    model=server.model, base_url=server.openai_url, api_key=SecretStr("none"), temperature=0, max_completion_tokens=400
)


class Person(BaseModel):
    """A person"""

    name: str
    age: int


@tool(description=WEATHER_DESCRIPTION)
def get_weather(city: str) -> str:
    return WEATHER_RESULT


answer = model.invoke(SUM)
server.says(str(answer.content), SUM_ANSWER)
assert answer.usage_metadata is not None
server.says("".join(str(piece.content) for piece in model.stream(SUM)), SUM_ANSWER)
for each in model.batch([SUM] * 3):
    server.says(str(each.content), SUM_ANSWER)

with_tools = model.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
called = with_tools.invoke(WEATHER)
(call,) = called.tool_calls
assert call["name"] == "get_weather"
server.says(call["args"]["city"], "Rome")
pieces = list(with_tools.stream(WEATHER))
joined = pieces[0]
for piece in pieces[1:]:
    joined = joined + piece
assert joined.tool_calls[0]["args"] == call["args"]
history = [HumanMessage(WEATHER), called, ToolMessage(WEATHER_RESULT, tool_call_id=call["id"])]
server.says(str(model.bind_tools([get_weather]).invoke(history).content), WEATHER_ANSWER)

person = model.with_structured_output(Person, method="json_schema").invoke(PERSON)
assert isinstance(person, Person)
server.is_person(person.name, person.age)
assert isinstance(model.with_structured_output(Person, method="function_calling").invoke(PERSON), Person)

responses = ChatOpenAI(
    model=server.model, base_url=server.openai_url, api_key=SecretStr("none"), temperature=0, use_responses_api=True
)
server.says(responses.bind(max_output_tokens=400).invoke(SUM).text, SUM_ANSWER)
completion = OpenAI(model=server.model, base_url=server.openai_url, api_key=SecretStr("none"), max_tokens=8)
assert completion.invoke("Once upon")
