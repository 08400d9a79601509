"""Anthropic's requests as chat requests: the one that this server has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pagoda.errors import InvalidRequestError, NotSupportedError, shown
from pagoda.serving.anthropic.types import AnthropicMessage, Blocks, CountTokensRequest, MessagesRequest
from pagoda.serving.openai.requests import parse_request
from pagoda.serving.openai.types import ChatCompletionRequest

# Claude Code puts it into the system prompt, and it differs from request to request: no prefix would ever be found again.
BILLING_HEADER = "x-anthropic-billing-header"
_ROLES = ("user", "assistant", "system")
_EFFORTS = {"max": "xhigh"}


def chat_request(request: CountTokensRequest, *, bounds_reasoning: bool = False) -> ChatCompletionRequest:
    """The chat that `request` is. Raises `InvalidRequestError` or `NotSupportedError` for blocks that cannot be understood.

    `bounds_reasoning`: this model's reasoning can be held to a budget. Clients send one to any model.
    """
    body: dict[str, Any] = {"messages": [*_system(request.system), *_messages(request.messages)]}
    tools = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema},
        }
        for tool in request.tools or ()
        if tool.input_schema is not None
    ]
    if tools:
        body["tools"] = tools
    body |= _tool_choice(request)
    body |= _thinking(request)
    if isinstance(request, MessagesRequest):
        given = {
            "max_tokens": request.max_tokens,
            "stop": request.stop_sequences or None,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "stream": request.stream,
        }
        body |= {name: value for name, value in given.items() if value is not None}
        if bounds_reasoning and request.thinking is not None and request.thinking.type == "enabled":
            body["thinking_token_budget"] = request.thinking.budget_tokens
    return parse_request(ChatCompletionRequest, body)


def _system(system: str | Blocks | None) -> Iterable[dict[str, Any]]:
    if isinstance(system, str):
        if system.startswith(BILLING_HEADER):
            system = system.partition("\n")[2]
        parts = [{"type": "text", "text": system}] if system else []
    else:
        parts = [
            {"type": "text", "text": text}
            for block in system or ()
            if not (text := _text_of(block, "system")).startswith(BILLING_HEADER)
        ]
    if parts:
        yield {"role": "system", "content": parts[0]["text"] if len(parts) == 1 else parts}


def _messages(messages: list[AnthropicMessage]) -> Iterable[dict[str, Any]]:
    for message in messages:
        if message.role not in _ROLES:
            raise InvalidRequestError(f"a message's role must be one of {', '.join(_ROLES)}", "messages")
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
        elif message.role == "assistant":
            yield _assistant(message.content)
        else:
            yield from _others(message.role, message.content)


def _assistant(blocks: Blocks) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        match block:
            case {"type": "tool_use", "id": str(call_id), "name": str(name)}:
                function = {"name": name, "arguments": block.get("input") or {}}
                calls.append({"id": call_id, "type": "function", "function": function})
            case {"type": "thinking", "thinking": str(thought)}:
                thoughts.append(thought)
            case {"type": "redacted_thinking"}:
                pass  # nobody but Anthropic can read it
            case _:
                texts.append(_text_of(block, "assistant"))
    message: dict[str, Any] = {"role": "assistant", "content": "\n\n".join(texts)}
    if thoughts:
        message["reasoning"] = "\n\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _others(role: str, blocks: Blocks) -> Iterable[dict[str, Any]]:
    """Results of tools as messages of their own, then the rest of the message."""
    parts: list[dict[str, Any]] = []
    for block in blocks:
        if block.get("type") != "tool_result":
            parts.append({"type": "text", "text": _text_of(block, role)})
            continue
        content = block.get("content") or ""
        if not isinstance(content, str):
            if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
                raise InvalidRequestError(
                    "the content of a tool_result must be a string or a list of blocks", "messages"
                )
            content = "\n".join(_text_of(part, "tool_result") for part in content)
        yield {"role": "tool", "tool_call_id": str(block.get("tool_use_id") or ""), "content": content}
    if parts:
        yield {"role": role, "content": parts[0]["text"] if len(parts) == 1 else parts}


def _text_of(block: dict[str, Any], where: str) -> str:
    match block:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "tool_reference", "tool_name": str(name)}:
            return name
        case {"type": "document", "source": {"type": "text", "data": str(text)}}:
            return text
        case {"type": "image" | "document"}:
            raise NotSupportedError(f"a block of type {block['type']} in {where} is not supported; only text is")
    raise InvalidRequestError(f"a block of type {shown(block.get('type'))} in {where} is not known here", "messages")


def _tool_choice(request: CountTokensRequest) -> dict[str, Any]:
    choice = request.tool_choice
    if choice is None:
        return {}
    fields: dict[str, Any] = {"parallel_tool_calls": not choice.disable_parallel_tool_use}
    match choice.type:
        case "auto" | "none":
            fields["tool_choice"] = choice.type
        case "any":
            fields["tool_choice"] = "required"
        case "tool" if choice.name:
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        case _:
            raise InvalidRequestError("tool_choice.type must be auto, any, none, or tool with a name", "tool_choice")
    return fields


def _thinking(request: CountTokensRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    config, thinking = request.output_config, request.thinking
    if config is not None and config.effort is not None:
        fields["reasoning_effort"] = _EFFORTS.get(config.effort, config.effort)
    if config is not None and config.format is not None:
        fields["response_format"] = {
            "type": config.format.get("type"),
            "json_schema": {"name": "output", "strict": True, "schema": config.format.get("schema")},
        }
    if thinking is not None and thinking.type not in ("enabled", "disabled", "adaptive"):
        raise InvalidRequestError("thinking.type must be enabled, disabled or adaptive", "thinking")
    if thinking is not None and thinking.type != "adaptive":
        fields["enable_thinking"] = thinking.type == "enabled"
    return fields
