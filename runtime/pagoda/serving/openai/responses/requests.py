"""Items and tools of a Responses request as a chat request: the one that this server has."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pagoda.errors import InvalidRequestError, NotSupportedError, shown
from pagoda.serving.openai.requests import parse_request
from pagoda.serving.openai.responses.types import ResponsesRequest
from pagoda.serving.openai.types import ChatCompletionRequest

logger = logging.getLogger(__name__)

Message = dict[str, Any]

# Fields whose effect this server does not have, by what they would have to be.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "background": (None, False),
    "conversation": (None,),
    "prompt": (None,),
    "truncation": (None, "disabled"),
    "max_tool_calls": (None,),
}
_PASSED_ON = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "priority", "cache_salt"),
    *("timeout_seconds", "chat_template_kwargs", "parallel_tool_calls", "stream"),
)
LOGPROBS = "message.output_text.logprobs"
_TEXTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})


@dataclass(frozen=True, slots=True)
class ToolKind:
    """What a function of the chat is in Responses: a function of a namespace, or a tool that takes one text."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


def chat_request(
    request: ResponsesRequest, earlier: list[Message]
) -> tuple[ChatCompletionRequest, list[Message], dict[str, ToolKind]]:
    """The chat that `request` is, after `earlier` messages; its messages without the instructions, and its tools by name.

    Raises `InvalidRequestError` or `NotSupportedError` for what cannot be understood.
    """
    for name, allowed in _UNSUPPORTED.items():
        value = (request.model_extra or {}).get(name)
        if value not in allowed:
            raise NotSupportedError(f"{name}={shown(value)} is not supported by this server")
    messages = [*earlier, *messages_of(request.input)]
    tools, kinds = _tools(request.tools or [])
    body: dict[str, Any] = {name: value for name in _PASSED_ON if (value := getattr(request, name)) is not None}
    body["messages"] = with_instructions(messages, request.instructions)
    if tools:
        body["tools"] = tools
    if request.tool_choice is not None and (tools or request.tool_choice not in ("auto", "none")):
        body["tool_choice"] = _tool_choice(request.tool_choice)
    if wants_logprobs(request):
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    if request.max_output_tokens is not None:
        body["max_tokens"] = request.max_output_tokens
    if request.reasoning is not None and request.reasoning.effort is not None:
        body["reasoning_effort"] = request.reasoning.effort
    form = (request.text.format if request.text is not None else None) or {"type": "text"}
    if form.get("type") == "json_schema":
        schema = {
            name: form[name] for name in ("name", "description", "schema", "strict") if form.get(name) is not None
        }
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif form.get("type") != "text":
        body["response_format"] = {"type": form.get("type")}
    return parse_request(ChatCompletionRequest, body), messages, kinds


def wants_logprobs(request: ResponsesRequest) -> bool:
    """Whether the texts are to have the log-probabilities of their tokens."""
    return bool(request.top_logprobs) or LOGPROBS in (request.include or ())


def function_name(name: str, namespace: object) -> str:
    """The name under which the model knows a function of a namespace."""
    return f"{namespace}__{name}" if isinstance(namespace, str) and namespace else name


def with_instructions(messages: list[Message], instructions: str | None) -> list[Message]:
    """One system message in front, for many chat templates take no other: of the instructions and what comes first."""
    first = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))
    texts = [*([instructions] if instructions else []), *(message["content"] for message in messages[:first])]
    return [*([{"role": "system", "content": "\n\n".join(texts)}] if texts else []), *messages[first:]]


def messages_of(items: str | list[dict[str, Any]]) -> list[Message]:
    """The items as messages; what an assistant thought, said and called in a row is one message."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[Message] = []
    for item in items:
        message = _message(item)
        if message is None:
            continue
        last = messages[-1] if messages else None
        if last is not None and last["role"] == message["role"] == "assistant" and _follows(message, last):
            for name, value in message.items():
                last[name] = [*last.get(name, []), *value] if name == "tool_calls" else value
        else:
            messages.append(message)
    return messages


def _follows(message: Message, last: Message) -> bool:
    """Whether the one part of `message` stands behind all that `last` has: reasoning, then content, then calls."""
    parts = ("reasoning", "content", "tool_calls")
    first = next(index for index, name in enumerate(parts) if name in message)
    return all(parts[index] not in last for index in range(first, 2)) and (first == 2 or "tool_calls" not in last)


def _message(item: dict[str, Any]) -> Message | None:
    """The message of one item, or its part of an assistant's message."""
    match item.get("type", "message"):
        case "message":
            role = item.get("role")
            if role not in ("user", "assistant", "system", "developer"):
                raise InvalidRequestError(f"input: a message has the role {shown(role)}", "input")
            role = "system" if role == "developer" else role
            return {"role": role, "content": _text(item.get("content"), "a message")}
        case "reasoning":
            text = _text(item.get("content") or item.get("summary") or [], "reasoning")
            return {"role": "assistant", "reasoning": text} if text else None
        case "function_call" | "custom_tool_call" as kind:
            given = item.get("arguments") if kind == "function_call" else json.dumps({"input": item.get("input")})
            name = item.get("name")
            if not isinstance(name, str) or not isinstance(given, str):
                raise InvalidRequestError(f"input: a {kind} needs a name and its arguments as text", "input")
            function = {"name": function_name(name, item.get("namespace")), "arguments": given}
            call = {"id": str(item.get("call_id") or ""), "type": "function", "function": function}
            return {"role": "assistant", "tool_calls": [call]}
        case "function_call_output" | "custom_tool_call_output":
            content = _text(item.get("output"), "the output of a call")
            return {"role": "tool", "tool_call_id": str(item.get("call_id") or ""), "content": content}
        case "item_reference":
            raise NotSupportedError("input: an item_reference is not supported; send the item itself")
        case kind:
            logger.debug("an input item of type %s is left out", shown(kind))
            return None


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"input: {where} must have text, or a list of parts", "input")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in ("input_image", "input_file", "input_audio"):
            raise NotSupportedError(f"input: a part of type {kind} is not supported; only text is")
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if (kind not in _TEXTS and kind != "refusal") or not isinstance(text, str):
            raise InvalidRequestError(f"input: {where} has a part of type {shown(kind)} without text", "input")
        texts.append(text)
    return "\n".join(texts)


def _tools(given: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, ToolKind]]:
    tools: list[dict[str, Any]] = []
    kinds: dict[str, ToolKind] = {}
    for tool, namespace in _flattened(given):
        name = tool.get("name")
        if not isinstance(name, str):
            raise InvalidRequestError(f"tools: a tool of type {shown(tool.get('type'))} needs a name", "tools")
        full_name = function_name(name, namespace)
        function = {"name": full_name, "description": tool.get("description")}
        is_custom = tool["type"] == "custom"
        if is_custom:
            function["parameters"] = {
                "type": "object",
                "properties": {"input": {"type": "string"}},
                "required": ["input"],
            }
        else:
            function |= {"parameters": tool.get("parameters"), "strict": tool.get("strict")}
        tools.append({"type": "function", "function": function})
        kinds[full_name] = ToolKind(name, namespace, is_custom)
    return tools, kinds


def _flattened(tools: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], str | None]]:
    """Functions and custom tools, with the namespace they are in; tools that run at OpenAI are left out."""
    for tool in tools:
        match tool:
            case {"type": "function" | "custom"}:
                yield tool, None
            case {"type": "namespace", "name": str(namespace), "tools": list(inner)}:
                for each in inner:
                    if isinstance(each, dict) and each.get("type", "function") in ("function", "custom"):
                        yield {"type": "function", **each}, namespace
            case _:
                logger.debug("a tool of type %s is left out", shown(tool.get("type")))


def _tool_choice(choice: str | dict[str, Any]) -> str | dict[str, Any]:
    match choice:
        case {"type": "function" | "custom", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "tools": list(tools), **rest}:
            return {"type": "allowed_tools", "allowed_tools": {"mode": rest.get("mode", "auto"), "tools": tools}}
    return choice
