"""What /v1/responses takes. Items and tools of kinds that are not known are left out, not refused: clients send new ones."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from pagoda.serving.openai.types import MAX_TOOLS, Integer, RequestModel, RequestPart, Strings

Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class Reasoning(RequestPart):
    """How much the model is to reason. A `summary` is not made: the reasoning itself is sent."""

    effort: str | None = None
    summary: str | None = None


class TextOptions(RequestPart):
    """The form of the answer's text."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(RequestModel):
    """A conversation to be continued: text, or items."""

    model_config = ConfigDict(
        strict=True, extra="allow", json_schema_extra={"example": {"input": "Who are you?", "max_output_tokens": 32}}
    )

    input: str | Objects
    instructions: str | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    max_output_tokens: Integer | None = Field(
        None, description="A bound; what does not fit the context is cut from it."
    )
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    store: bool | None = Field(None, description="Default: true. Kept in memory, for a while.")
    previous_response_id: str | None = None
    metadata: dict[str, Any] | None = None
    include: Strings | None = Field(
        None, description="message.output_text.logprobs; what else there is of OpenAI's changes nothing."
    )
    top_logprobs: Integer | None = Field(None, description="Most probable tokens at each position of a text.")

    # Beyond OpenAI, as in chats.
    top_k: Integer | None = None
    min_p: float | None = None
    seed: Integer | None = None
    repetition_penalty: float | None = None
    priority: Integer | None = None
    cache_salt: str | None = None
    timeout_seconds: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None
