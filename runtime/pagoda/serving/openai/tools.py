"""The tools of a request, which of them may be called, and whether the model is to reason."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from pagoda.errors import InvalidRequestError, shown
from pagoda.request import AnswerOptions
from pagoda.serving.openai.types import ChatCompletionRequest, ToolDefinition
from pagoda.text.responses.checkpoint import AnswerFormat

logger = logging.getLogger(__name__)

MAX_NAME_CHARACTERS = 128
REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_CHOICES = "none, auto, required, or an object of type function or allowed_tools"


def answer_options(request: ChatCompletionRequest, format: AnswerFormat | None) -> AnswerOptions:
    """How the answer to `request` is parsed; raises `InvalidRequestError` for tools and choices that cannot be."""
    names = _checked_names(request.tools or ())
    allowed = _allowed_names(request.tool_choice, names)
    if allowed and (format is None or not format.has_calls):
        raise InvalidRequestError(
            "tools cannot be used: the format of this model's tool calls is not known. If it has one, start the server with "
            "--tool-call-parser",
            "tools",
        )
    schemas = {tool.function.name: tool.function.parameters or {} for tool in request.tools or () if tool.function}
    return AnswerOptions(
        tools={name: schemas[name] for name in allowed},
        parallel_tool_calls=request.parallel_tool_calls is not False,
        continued=_continued(request),
    )


def template_tools(tools: Sequence[ToolDefinition] | None, tool_choice: str | dict[str, Any] | None) -> Any:
    """The tools as the chat template gets them: as the client wrote them, or None where none is to be called."""
    if not tools or tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


def reasoning_variables(effort: str | None, enable_thinking: bool | None) -> dict[str, Any]:
    """Variables of the chat template that ask for reasoning, or for none; families have different ones."""
    if effort is not None and effort not in REASONING_EFFORTS:
        raise InvalidRequestError(
            f"reasoning_effort must be one of {', '.join(REASONING_EFFORTS)}, got {shown(effort)}", "reasoning_effort"
        )
    variables: dict[str, Any] = {} if effort in (None, "none") else {"reasoning_effort": effort}
    thinks = enable_thinking if enable_thinking is not None else None if effort is None else effort != "none"
    return variables if thinks is None else {**variables, "enable_thinking": thinks, "thinking": thinks}


def _checked_names(tools: Sequence[ToolDefinition]) -> list[str]:
    names: list[str] = []
    for index, tool in enumerate(tools):
        if tool.type != "function" or tool.function is None:
            raise InvalidRequestError(f"tools[{index}] must have type function and a function", "tools")
        name = tool.function.name
        if not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable() or any(map(str.isspace, name)):
            raise InvalidRequestError(
                f"tools[{index}].function.name must have 1 to {MAX_NAME_CHARACTERS} characters and no spaces, got "
                f"{shown(name)}",
                "tools",
            )
        if name in names:
            raise InvalidRequestError(f"tools has two functions with the name {shown(name)}", "tools")
        names.append(name)
    return names


def _allowed_names(choice: str | dict[str, Any] | None, names: list[str]) -> list[str]:
    """The names of the tools that may be called."""
    match choice:
        case None | "auto":
            return names
        case "none":
            return []
        case "required":
            _refuse_forced("required", names)
        case {"type": "function", "function": {"name": str(name)}}:
            _refuse_forced(name, names)
            if name not in names:
                raise InvalidRequestError(f"tool_choice names {shown(name)}, which is not in tools", "tool_choice")
        case {"type": "allowed_tools", "allowed_tools": {"tools": list(tools), **rest}}:
            allowed = [_name_in(tool) for tool in tools]
            unknown = next((name for name in allowed if name not in names), None)
            if unknown is not None or not allowed:
                raise InvalidRequestError(f"tool_choice allows {shown(unknown)}, which is not in tools", "tool_choice")
            if rest.get("mode", "auto") != "auto":
                _refuse_forced("allowed_tools with mode required", names)
            return allowed
    raise InvalidRequestError(f"tool_choice must be {_CHOICES}, got {shown(choice)}", "tool_choice")


def _refuse_forced(what: str, names: list[str]) -> None:
    if not names:
        raise InvalidRequestError(f"tool_choice {shown(what)} needs tools", "tool_choice")
    raise InvalidRequestError(
        f"tool_choice {shown(what)} is not supported by this server yet: it takes none and auto", "tool_choice"
    )


def _name_in(tool: Any) -> str:
    match tool:
        case {"function": {"name": str(name)}} | {"name": str(name)}:
            return name
    raise InvalidRequestError("tool_choice: every one of allowed_tools.tools must name a function", "tool_choice")


def _continued(request: ChatCompletionRequest) -> str:
    """The beginning of the answer that the client gave."""
    if not request.continue_final_message or not request.messages:
        return ""
    content = request.messages[-1].get("content")
    if isinstance(content, list):
        return str(content[-1].get("text", "")) if content else ""
    return content or ""
