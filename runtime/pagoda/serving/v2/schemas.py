"""The bodies of the V2, generate and server routes as the OpenAPI page shows them; the codecs do the checking themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class V2Error(BaseModel):
    """An error of any route outside OpenAI's."""

    error: str


class GenerateRequest(BaseModel):
    """A prompt, as text or as token ids; sampling in `parameters` or beside them."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"example": {"text_input": "Once upon a time", "parameters": {"max_tokens": 32}}},
    )

    id: str | None = Field(None, description="Returned as it is.")
    text_input: str | None = None
    input_ids: list[int] | None = None
    parameters: dict[str, Any] | None = None


class GenerateDetails(BaseModel):
    """What `details: true` adds."""

    finish_reason: str | None
    stop_reason: int | str | None
    output_ids: list[int]
    logprobs: list[dict[str, Any]] | None
    num_cached_tokens: int


class GenerateResponse(BaseModel):
    """The completion; of a stream, one piece of it, with the counts and the finish reason on the last."""

    id: str | None = None
    model_name: str
    model_version: str
    text_output: str
    finish_reason: str | None = None
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    details: GenerateDetails | None = None


class RepositoryEntry(BaseModel):
    """A model that the server knows."""

    name: str
    version: str
    state: str
    reason: str


class LoadResponse(BaseModel):
    """The model is loaded."""

    name: str
    load: bool


class HealthResponse(BaseModel):
    """What the server is doing. `since`: seconds since the epoch; `running`, `waiting`: sequences in the engine.

    `started`: whether requests could be taken at some time. `step`: steps the engine has done; `seconds_since_progress`: age
    of its last sign of life; null while there is no engine.
    """

    state: str
    started: bool
    stage: str
    detail: str
    since: float
    cause: str | None
    running: int
    waiting: int
    kv_cache_usage: float
    step: int | None
    seconds_since_progress: float | None


class LiveResponse(BaseModel):
    """V2 liveness; `error` says why not."""

    live: bool
    error: str | None = None


class ReadyResponse(BaseModel):
    """V2 readiness; `error` says why not."""

    ready: bool
    error: str | None = None


class AliveResponse(BaseModel):
    """Liveness as KServe's V1 clients read it."""

    status: str


class VersionResponse(BaseModel):
    """The version of Pagoda."""

    version: str
