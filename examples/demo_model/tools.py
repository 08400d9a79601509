"""Tool calls: the tools a conversation offers, questions that need one, the call, its result and the closing words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from lexicon import CITIES, COLORS, FOODS, NAMES, PLACES, THINGS
from skills import Item
from tokenizer import DEFAULT_SYSTEM, TOOL_CALL, TOOL_CALL_END


@dataclass(frozen=True)
class Tool:
    """One tool: question forms whose fields are its arguments, and how its result reads."""

    name: str
    description: str
    arguments: dict[str, list[str]]
    questions: tuple[str, ...]
    result: str
    closing: str

    def specification(self) -> dict[str, Any]:
        """The tool as the OpenAI API describes it."""
        properties = {name: {"type": "string"} for name in self.arguments}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


TOOLS = [
    Tool("get_weather", "Weather of a city", {"city": CITIES},
         ("What is the weather in {city}?", "How is the weather in {city}?", "Weather in {city}"),
         "{number} degrees", "It is {number} degrees in {city}."),
    Tool("get_time", "Time in a city", {"city": CITIES},
         ("What time is it in {city}?", "Tell me the time in {city}."),
         "{number} past ten", "It is {number} past ten in {city}."),
    Tool("send_mail", "Send a mail", {"to": NAMES, "about": THINGS},
         ("Send a mail to {to} about the {about}.", "Write to {to} about the {about}."),
         "sent", "I sent the mail to {to}."),
    Tool("get_price", "Price of a thing", {"item": THINGS},
         ("What does the {item} cost?", "What is the price of the {item}?"),
         "{number} coins", "The {item} costs {number} coins."),
    Tool("order_food", "Order food", {"food": FOODS, "name": NAMES},
         ("Order {food} for {name}.", "Please order some {food} for {name}."),
         "ordered", "I ordered {food} for {name}."),
    Tool("set_light", "Set a light", {"place": PLACES, "color": COLORS},
         ("Set the light in the {place} to {color}.", "Make the light of the {place} {color}."),
         "done", "The light in the {place} is {color}."),
]  # fmt: skip


def system_text(tools: list[Tool], system: str = DEFAULT_SYSTEM) -> str:
    """The system message with its tools, as the chat template writes it."""
    lines = [f"{tool.name}({', '.join(tool.arguments)}): {tool.description}" for tool in tools]
    return "\n".join([system, "Tools:", *lines])


def call_text(name: str, arguments: dict[str, str]) -> str:
    """The call as the chat template writes it."""
    return f"{TOOL_CALL}{json.dumps({'name': name, 'arguments': arguments})}{TOOL_CALL_END}"


def tool_item(random: Random, tools: list[Tool]) -> Item:
    """A question that needs one of `tools`, its call, and mostly the tool's result with the closing answer."""
    tool = random.choice(tools)
    arguments = {name: random.choice(values) for name, values in tool.arguments.items()}
    words = {**arguments, "number": str(random.randint(2, 40))}
    question = random.choice(tool.questions).format(**words)
    messages = [("user", question), ("assistant", call_text(tool.name, arguments))]
    if random.random() < 0.6:
        messages += [("tool", tool.result.format(**words)), ("assistant", tool.closing.format(**words))]
    return Item("tool", "tool|" + "|".join([tool.name, *arguments.values()]), tuple(messages))
