"""The generate extension (Triton's shape) on the REST wire: one prompt in plain JSON, its completion whole or in events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.errors import InvalidRequestError, shown
from pagoda.request import TokenIds
from pagoda.serving.http.bodies import parse_object
from pagoda.serving.json_decoding import JsonLimits
from pagoda.serving.parameters import TIMEOUT_HEADER, parse_timeout_header
from pagoda.serving.v2.inference import INPUT_IDS, TEXT_INPUT, V2Request, check_request_id, logprobs_json
from pagoda.serving.v2.service import MODEL_VERSION, V2Call
from pagoda.serving.v2.tensors import BYTES, tensor_from_values
from pagoda.text.output import CompletionOutput

# What of a body is no parameter.
_MEMBERS = frozenset({TEXT_INPUT, INPUT_IDS, "id", "parameters"})


def decode_generate(
    body: bytes | bytearray, headers: Mapping[str, str], model_name: str, model_version: str | None, limits: JsonLimits
) -> V2Request:
    """The request in a body: `text_input` or `input_ids`, and parameters in `parameters` or beside them."""
    content = parse_object(body, limits)
    request_id = content.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InvalidRequestError(f"id must be a string, got {shown(request_id)}", "id")
    inputs = []
    if (text := content.get(TEXT_INPUT)) is not None:
        # A list here is no batch, and not the nesting that the tensor's own check would speak of.
        if isinstance(text, list | TokenIds):
            raise InvalidRequestError(f"{TEXT_INPUT} must be one string here, got {shown(text)}", TEXT_INPUT)
        inputs.append(tensor_from_values(TEXT_INPUT, BYTES, [1], [text]))
    if (ids := content.get(INPUT_IDS)) is not None:
        length = len(ids) if isinstance(ids, list | TokenIds) else 1
        inputs.append(tensor_from_values(INPUT_IDS, "INT64", [length], ids))
    return V2Request(
        method="generate",
        model_name=model_name,
        model_version=model_version or "",
        request_id=check_request_id(request_id or ""),
        inputs=inputs,
        parameters=_parameters(content),
        timeout_seconds=parse_timeout_header(headers.get(TIMEOUT_HEADER)),
    )


def envelope(call: V2Call) -> dict[str, Any]:
    """The members that every response and every event of a call begin with."""
    request_id = {"id": call.request.request_id} if call.request.request_id else {}
    return {**request_id, "model_name": call.model.name, "model_version": MODEL_VERSION}


def encode_result(call: V2Call, result: CompletionOutput) -> dict[str, Any]:
    """The members of a response that describe its finished sequence."""
    content: dict[str, Any] = {
        "text_output": result.text,
        "finish_reason": result.finish_reason,
        "num_input_tokens": result.num_prompt_tokens,
        "num_output_tokens": len(result.token_ids),
    }
    if call.batch.jobs[0].details:
        content["details"] = {
            "finish_reason": result.finish_reason,
            "stop_reason": result.stop_reason,
            "output_ids": result.token_ids,
            "logprobs": None if result.logprobs is None else logprobs_json(result.logprobs),
            "num_cached_tokens": result.num_cached_tokens,
        }
    return content


def _parameters(content: Mapping[str, object]) -> dict[str, object]:
    beside = {name: value for name, value in content.items() if name not in _MEMBERS}
    inside = content.get("parameters")
    if inside is None:
        return beside
    if not isinstance(inside, Mapping):
        raise InvalidRequestError(f"parameters must be an object, got {shown(inside)}", "parameters")
    for name in inside:
        if name in beside:
            raise InvalidRequestError(f"{name} is given both in the body and in its parameters", name)
    return {**beside, **inside}
