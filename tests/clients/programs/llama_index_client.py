"""`llama-index-llms-openai-like`: chats, completions, streams, tools, structured answers."""

from __future__ import annotations

from common import PERSON, SUM, SUM_ANSWER, WEATHER, WEATHER_DESCRIPTION, WEATHER_RESULT, Server
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

server = Server()
llm = OpenAILike(
    model=server.model,
    api_base=server.openai_url,
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=2048,
    temperature=0,
    max_tokens=400,
    max_retries=0,
)


class Person(BaseModel):
    """A person"""

    name: str
    age: int


def get_weather(city: str) -> str:
    return WEATHER_RESULT


question = [ChatMessage(role="user", content=SUM)]
server.says(llm.chat(question).message.content, SUM_ANSWER)
server.says("".join(piece.delta or "" for piece in llm.stream_chat(question)), SUM_ANSWER)
server.says(llm.complete(SUM).text, SUM_ANSWER)

plain = OpenAILike(model=server.model, api_base=server.openai_url, api_key="none", is_chat_model=False, max_tokens=8)
assert plain.complete("Once upon").text
assert list(plain.stream_complete("Once upon"))[-1].text

tool = FunctionTool.from_defaults(get_weather, description=WEATHER_DESCRIPTION)
called = llm.chat_with_tools([tool], user_msg=WEATHER, tool_required=True)
(selected,) = llm.get_tool_calls_from_response(called)
assert selected.tool_name == "get_weather"
server.says(selected.tool_kwargs["city"], "Rome")
assert str(llm.predict_and_call([tool], user_msg=WEATHER, tool_required=True)) == WEATHER_RESULT

person = llm.structured_predict(Person, PromptTemplate(PERSON))
assert isinstance(person, Person)
