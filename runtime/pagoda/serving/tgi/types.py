"""What the routes of Text Generation Inference take and give."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pagoda.serving.openai.types import Integer, RequestModel, RequestPart, Strings


class TgiGrammar(RequestPart):
    """The form of the answer."""

    type: Literal["json", "regex", "json_schema"]
    value: Any


class TgiParameters(RequestPart):
    """Sampling by TGI's names. Greedy, unless `do_sample` or a sampling parameter asks for something else."""

    max_new_tokens: Integer | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: Integer | None = None
    top_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Integer | None = None
    stop: Strings | None = None
    best_of: Integer | None = None
    watermark: bool | None = None
    adapter_id: str | None = None
    return_full_text: bool | None = None
    truncate: Integer | None = Field(
        default=None, description="Only so many tokens of the prompt count, the last ones."
    )
    details: bool | None = None
    decoder_input_details: bool | None = Field(default=None, description="The prompt's tokens, too; not in a stream.")
    top_n_tokens: Integer | None = Field(default=None, description="So many candidates at each token.")
    grammar: TgiGrammar | None = None


class TgiRequest(RequestModel):
    """A prompt to be completed."""

    model_config = ConfigDict(
        strict=True,
        extra="allow",
        json_schema_extra={"example": {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 32}}},
    )

    inputs: str
    parameters: TgiParameters | None = None
    stream: bool | None = Field(default=None, description="For `POST /` only.")


class TgiDetails(BaseModel):
    """What came of a prompt."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[dict[str, Any]] = []
    tokens: list[dict[str, Any]] = []


class TgiResponse(BaseModel):
    """The completion."""

    generated_text: str
    details: TgiDetails | None = None


class TgiInfo(BaseModel):
    """The model, and the limits of this server."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
