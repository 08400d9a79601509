"""The `anthropic` package: messages, streams, tools with their results, counting tokens, errors."""

from __future__ import annotations

from typing import Any

import anthropic
from common import SUM, SUM_ANSWER, WEATHER, WEATHER_ANSWER, WEATHER_DESCRIPTION, WEATHER_RESULT, Server

server = Server()
client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
model: Any = server.model
TOOL: Any = {
    "name": "get_weather",
    "description": WEATHER_DESCRIPTION,
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
# How many calls a model makes beyond the first is its own affair.
ONE_CALL: Any = {"type": "any", "disable_parallel_tool_use": True}

message = client.messages.create(
    model=model, max_tokens=400, extra_body={"temperature": 0}, messages=[{"role": "user", "content": SUM}]
)
server.says(message.content[0].text, SUM_ANSWER)  # type: ignore[union-attr]
assert message.usage.output_tokens > 0

with client.messages.stream(
    model=model, max_tokens=400, extra_body={"temperature": 0}, messages=[{"role": "user", "content": SUM}]
) as stream:
    server.says("".join(stream.text_stream), SUM_ANSWER)
assert stream.get_final_message().stop_reason in ("end_turn", "max_tokens")

messages: list[Any] = [{"role": "user", "content": WEATHER}]
asked: dict[str, Any] = {"model": model, "max_tokens": 400, "extra_body": {"temperature": 0}, "tools": [TOOL]}
with client.messages.stream(**asked, messages=messages, tool_choice=ONE_CALL) as stream:
    called = stream.get_final_message()
assert called.stop_reason == "tool_use"
(use,) = (block for block in called.content if block.type == "tool_use")
server.says(use.input["city"], "Rome")  # type: ignore[index]
messages += [
    {"role": "assistant", "content": called.content},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": WEATHER_RESULT}]},
]
final = client.messages.create(**asked, messages=messages)
server.says(final.content[0].text, WEATHER_ANSWER)  # type: ignore[union-attr]

counted = client.messages.count_tokens(model=model, messages=[{"role": "user", "content": SUM}])
assert counted.input_tokens == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
try:
    client.messages.create(model=model, max_tokens=4, messages=[{"role": "nobody", "content": "a"}])  # type: ignore[typeddict-item]
except anthropic.BadRequestError as error:
    said = str(error)
else:
    said = "nothing"
assert "role" in said, said
