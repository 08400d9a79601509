"""What Ollama's routes take. Fields that are not known are logged once and ignored, as in OpenAI's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator

from pagoda.serving.openai.types import Ids, Integer, RequestModel, RequestPart, Strings, Tools, messages_of

LATEST = ":latest"


class OllamaOptions(RequestPart):
    """Sampling by Ollama's names; -1 and -2 of `num_predict` mean as many tokens as fit."""

    num_predict: Integer | None = None
    temperature: float | None = None
    top_k: Integer | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: Integer | None = Field(
        None, description="0: no repeat_penalty. Else it counts for all that came before."
    )
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Integer | None = Field(None, description="-1: none.")
    stop: str | Strings | None = None
    typical_p: float | None = None
    tfs_z: float | None = None
    mirostat: Integer | None = None


class OllamaRequest(RequestModel):
    """What the generating routes have in common. A name of a model may end in `:latest`."""

    stream: bool | None = Field(None, description="Default: true.")
    options: OllamaOptions | None = None
    format: str | dict[str, Any] | None = Field(None, description="`json`, or a JSON schema.")
    think: bool | str | None = Field(
        None, description="Whether the model is to reason, or how much: low, medium, high."
    )
    keep_alive: str | float | None = Field(None, description="Changes nothing: the model lives as long as the server.")
    logprobs: bool | None = None
    top_logprobs: Integer | None = None

    @field_validator("model")
    @classmethod
    def _without_tag(cls, name: str | None) -> str | None:
        return name.removesuffix(LATEST) if name else None


class OllamaGenerateRequest(OllamaRequest):
    """One prompt, through the chat template unless it is `raw`."""

    model_config = ConfigDict(
        strict=True, extra="allow", json_schema_extra={"example": {"model": "demo", "prompt": "Who are you?"}}
    )

    prompt: str | None = Field(None, description="Empty: the model is loaded, which it is.")
    system: str | None = None
    raw: bool | None = None
    context: Ids | None = Field(None, description="What an earlier answer gave: its tokens stand before the prompt's.")
    template: str | None = None
    suffix: str | None = None
    images: list[Any] | None = None


class OllamaFunction(RequestPart):
    """A function's name and arguments."""

    name: str
    arguments: dict[str, Any] | None = None


class OllamaCall(RequestPart):
    """A call of a tool."""

    function: OllamaFunction


class OllamaMessage(RequestPart):
    """One message of a conversation."""

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: Annotated[list[OllamaCall], Field(fail_fast=True)] | None = None
    tool_name: str | None = None


class OllamaChatRequest(OllamaRequest):
    """A conversation to be continued by the assistant."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        json_schema_extra={"example": {"model": "demo", "messages": [{"role": "user", "content": "Who are you?"}]}},
    )

    messages: Annotated[list[dict[str, Any]], messages_of(OllamaMessage)] | None = None
    tools: Tools | None = None


class OllamaShowRequest(RequestModel):
    """The model to be described, also by its old field `name`."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"example": {"model": "demo"}})

    name: str | None = None
    verbose: bool | None = None

    @field_validator("model", "name")
    @classmethod
    def _without_tag(cls, name: str | None) -> str | None:
        return name.removesuffix(LATEST) if name else None
