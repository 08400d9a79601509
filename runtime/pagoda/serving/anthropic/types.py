"""What Anthropic's routes take. Unknown fields are ignored: its clients send many that mean something to Anthropic only."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from pagoda.serving.openai.types import MAX_TOOLS, Integer, RequestModel, RequestPart, Strings

Blocks = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class AnthropicMessage(RequestPart):
    """One message: text, or blocks of text, calls of tools and their results."""

    role: str
    content: str | Blocks


class AnthropicTool(RequestPart):
    """A tool that may be called. One without `input_schema` runs at Anthropic, and is left out here."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(RequestPart):
    """`type`: auto, any, tool or none."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(RequestPart):
    """`type`: enabled, disabled or adaptive."""

    type: str
    budget_tokens: Integer | None = None


class OutputConfig(RequestPart):
    """How much the model is to think, and the form of the answer."""

    effort: str | None = None
    format: dict[str, Any] | None = None


class CountTokensRequest(RequestModel):
    """A conversation whose prompt is to be counted."""

    messages: Annotated[list[AnthropicMessage], Field(fail_fast=True)]
    system: str | Blocks | None = None
    tools: Annotated[list[AnthropicTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest):
    """A conversation to be continued by the assistant."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        json_schema_extra={"example": {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 32}},
    )

    max_tokens: Integer | None = Field(
        None, description="A bound; what does not fit the model's context is left out of it."
    )
    stop_sequences: Strings | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    stream: bool | None = None
