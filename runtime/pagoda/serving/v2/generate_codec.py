"""The generate extension (Triton's shape) on the REST wire: one prompt in plain JSON, its completion whole or in events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from pagoda.errors import InvalidRequestError, NotSupportedError, shown
from pagoda.request import TokenIds
from pagoda.serving.http.bodies import parse_object
from pagoda.serving.json_decoding import JsonLimits
from pagoda.serving.parameters import TIMEOUT_HEADER, as_boolean, parse_timeout_header
from pagoda.serving.v2.call import V2Call
from pagoda.serving.v2.inference import INPUT_IDS, TEXT_INPUT, V2Request, check_request_id, logprobs_json
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
    return {**request_id, "model_name": call.model.name, "model_version": call.model.version}


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


# What TensorRT-LLM's and vLLM's models of Triton call parameters, and what they are here.
_TRITON_NAMES = {
    "max_new_tokens": "max_tokens",
    "request_output_len": "max_tokens",
    "output_len": "max_tokens",
    "stop_words": "stop",
    "stop_words_list": "stop",
    "bad_words_list": "bad_words",
    "random_seed": "seed",
    "min_length": "min_tokens",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
}
_MAX_JSON_CHARACTERS = 1 << 16
_OF_TRITONS_BEAMS = {"beam_width": 1, "len_penalty": 1.0, "length_penalty": 1.0, "early_stopping": 0}


def _parameters(content: Mapping[str, object]) -> dict[str, object]:
    return _without_triton_names(_given_parameters(content))


def _without_triton_names(given: Mapping[str, object]) -> dict[str, object]:
    """The parameters by Pagoda's names; those of beams are taken with the values that mean none."""
    parameters: dict[str, object] = {}

    def put(name: str, value: object, written: str) -> None:
        if name in parameters:
            raise InvalidRequestError(f"{written} is given twice, as {name} too", written)
        parameters[name] = value

    for written, value in given.items():
        if written in _OF_TRITONS_BEAMS:
            if value not in (None, False, _OF_TRITONS_BEAMS[written]):
                raise NotSupportedError(f"{written}={shown(value)} is not supported: there is no beam search", written)
        elif written == "end_id":
            put("stop_token_ids", [value], written)
        elif written == "return_log_probs":
            if as_boolean(written, value):
                put("logprobs", 0, written)
                put("details", True, written)
        elif written == "exclude_input_in_output":
            put("echo", not as_boolean(written, value), written)
        elif written == "sampling_parameters":
            for name, inner in _of_json_text(written, value).items():
                put(name, inner, written)
        elif written != "pad_id":  # nothing is padded
            value = [] if written in ("stop_words", "bad_words") and value == "" else value
            put(_TRITON_NAMES.get(written, written), value, written)
    return parameters


def _of_json_text(name: str, value: object) -> Mapping[str, object]:
    """vLLM's model takes its sampling parameters as JSON text in one."""
    parsed = value
    if isinstance(value, str) and len(value) <= _MAX_JSON_CHARACTERS:
        try:
            parsed = orjson.loads(value or "{}")
        except orjson.JSONDecodeError:
            parsed = None
    if not isinstance(parsed, Mapping):
        raise InvalidRequestError(f"{name} must be a JSON object in a string, got {shown(value)}", name)
    return parsed


def _given_parameters(content: Mapping[str, object]) -> dict[str, object]:
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
