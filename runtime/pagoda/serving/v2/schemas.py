"""The bodies of the V2 and generate routes as the OpenAPI page shows them; the codecs do the checking themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

Parameters = dict[str, StrictFloat | StrictInt | StrictBool | str]


class ServerMetadataResponse(BaseModel):
    """The server and the extensions of the protocol that it has."""

    name: str
    version: str
    extensions: list[str]


class MetadataTensor(BaseModel):
    """An input or output of a model; -1 in `shape` is any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadataResponse(BaseModel):
    """What a model takes and gives."""

    name: str
    versions: list[str] | None = None
    platform: str
    inputs: list[MetadataTensor]
    outputs: list[MetadataTensor]


class ModelReadyResponse(BaseModel):
    """The model accepts requests."""

    name: str
    ready: bool


class LiveResponse(BaseModel):
    """V2 liveness; `error` says why not."""

    live: bool
    error: str | None = None


class ReadyResponse(BaseModel):
    """V2 readiness; `error` says why not."""

    ready: bool
    error: str | None = None


class RequestInput(BaseModel):
    """A tensor, row-major: `data`, or binary data behind the JSON of `binary_data_size` (in its parameters) bytes."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters | None = None
    data: list[Any] | None = None


class RequestOutput(BaseModel):
    """An output that is wanted; `binary_data` in its parameters says in which form."""

    name: str
    parameters: Parameters | None = None


class InferenceRequest(BaseModel):
    """A batch of prompts as tensors, and sampling as parameters or tensors."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["Once upon a time"]}],
                "parameters": {"max_tokens": 32},
                "outputs": [{"name": "text_output"}],
            }
        }
    )

    id: str | None = None
    parameters: Parameters | None = None
    inputs: list[RequestInput]
    outputs: list[RequestOutput] | None = None


class ResponseOutput(BaseModel):
    """An output tensor, row-major: `data`, or binary data behind the JSON."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters | None = None
    data: list[Any] | None = None


class InferenceResponse(BaseModel):
    """The outputs of all prompts."""

    model_name: str
    model_version: str | None = None
    id: str
    outputs: list[ResponseOutput]


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


class UnloadResponse(BaseModel):
    """The model is unloaded."""

    name: str
    unload: bool


class LoadResponse(BaseModel):
    """The model is loaded."""

    name: str
    load: bool
