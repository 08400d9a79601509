"""The tools of a request, which of them may be called, and whether the model is to reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson

from pagoda.errors import InvalidRequestError, shown
from pagoda.request import AnswerOptions, GenerationRequest
from pagoda.serving.openai.types import ChatCompletionRequest, ToolDefinition
from pagoda.structured.spec import GrammarSpec
from pagoda.text.responses.checkpoint import AnswerFormat
from pagoda.text.responses.structural_tags import calls_or_json, calls_or_text, required_calls
from pagoda.text.responses.tools import ToolSet

MAX_NAME_CHARACTERS = 128
REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_CHOICES = "none, auto, required, or an object of type function or allowed_tools"


def answer_options(request: ChatCompletionRequest, format: AnswerFormat | None) -> AnswerOptions:
    """How the answer to `request` is parsed; raises `InvalidRequestError` for tools and choices that cannot be."""
    names = _checked_names(request.tools or ())
    allowed, _ = _allowed_names(request.tool_choice, names)
    if allowed and (format is None or not format.has_calls):
        raise InvalidRequestError(
            "tools cannot be used: the format of this model's tool calls is not known. If it has one, start the server with "
            "--tool-call-parser",
            "tools",
        )
    schemas = {tool.function.name: tool.function.parameters or {} for tool in request.tools or () if tool.function}
    return AnswerOptions(
        tools={name: schemas[name] for name in allowed},
        parallel_tool_calls=request.parallel_tool_calls is not False and not is_named(request.tool_choice),
        continued=_continued(request),
        thinking_token_budget=_thinking_token_budget(request.thinking_token_budget, format),
    )


def _thinking_token_budget(budget: int | None, format: AnswerFormat | None) -> int | None:
    """The budget, None without one; -1 is none, as vLLM has it."""
    if budget is None or budget == -1:
        return None
    if budget < 0:
        raise InvalidRequestError(
            f"thinking_token_budget must be an integer of at least 0, or -1 for none, got {budget}",
            "thinking_token_budget",
        )
    if format is None or not format.can_end_reasoning:
        raise InvalidRequestError(
            "thinking_token_budget cannot be held: this model's reasoning is not known to end with a marker. If it has one, "
            "start the server with --reasoning-parser",
            "thinking_token_budget",
        )
    return budget


def is_named(choice: str | dict[str, Any] | None) -> bool:
    """Whether `tool_choice` wants a call of one function."""
    return isinstance(choice, dict) and choice.get("type") == "function"


def constrained(
    request: ChatCompletionRequest, job: GenerationRequest, format: AnswerFormat | None
) -> GenerationRequest:
    """`job` held to a grammar of calls where `tool_choice` wants a call, or where tools are strict.

    Raises `InvalidRequestError` where a call is wanted and this model's format has no grammar here.
    """
    answer = job.answer
    if answer is None or not answer.tools or format is None:
        return job
    _, is_forced = _allowed_names(request.tool_choice, list(answer.tools))
    tools = ToolSet(answer.tools, answer.parallel_tool_calls)
    if is_forced and format.grammar_name is None:
        raise InvalidRequestError(
            "a tool_choice that wants a call cannot be held in the format of this model's tool calls; auto and none can",
            "tool_choice",
        )
    if format.grammar_name is None:
        return job
    name, grammar = format.grammar_name, job.params.structured_outputs
    strict = [tool.function.name for tool in request.tools or () if tool.function and tool.function.strict]
    tag: dict[str, Any] | None = None
    if is_forced:
        tag = required_calls(name, tools)
    elif grammar is not None and grammar.kind in (
        "json_schema",
        "json_object",
    ):  # the form of what is said after the calls
        tag = calls_or_json(name, tools, orjson.loads(grammar.source or '{"type": "object"}'))
    elif grammar is None and strict:
        tag = calls_or_text(name, tools, strict, one_reasoning=answer.thinking_token_budget is not None)
    if tag is None:
        return job
    params = replace(job.params, structured_outputs=GrammarSpec.of_structural_tag(tag))
    return replace(job, params=params, answer=replace(answer, is_constrained=True, only_calls=is_forced))


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


def _allowed_names(choice: str | dict[str, Any] | None, names: list[str]) -> tuple[list[str], bool]:
    """The names of the tools that may be called, and whether one must be."""
    match choice:
        case None | "auto":
            return names, False
        case "none":
            return [], False
        case "required" if names:
            return names, True
        case "required":
            raise InvalidRequestError("tool_choice required needs tools", "tool_choice")
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in names:
                raise InvalidRequestError(f"tool_choice names {shown(name)}, which is not in tools", "tool_choice")
            return [name], True
        case {"type": "allowed_tools", "allowed_tools": {"tools": list(tools), **rest}}:
            allowed = [_name_in(tool) for tool in tools]
            unknown = next((name for name in allowed if name not in names), None)
            if unknown is not None or not allowed:
                raise InvalidRequestError(f"tool_choice allows {shown(unknown)}, which is not in tools", "tool_choice")
            return allowed, rest.get("mode", "auto") != "auto"
    raise InvalidRequestError(f"tool_choice must be {_CHOICES}, got {shown(choice)}", "tool_choice")


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
