"""V2 infer requests and responses on the REST wire: JSON, with tensors in it or as binary data behind it.

Binary data follows Triton's binary tensor extension: the header `Inference-Header-Content-Length` says where the JSON ends,
and the data of the tensors that have a `binary_data_size` lie behind it in order. The form of an output is what
`binary_data` of the requested output says, else what `binary_data_output` of the request says, else JSON.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from pagoda.errors import InvalidRequestError, shown
from pagoda.serving.http.bodies import parse_object
from pagoda.serving.http.responses import json_response
from pagoda.serving.json_decoding import JsonLimits
from pagoda.serving.parameters import TIMEOUT_HEADER, as_boolean, parse_timeout_header
from pagoda.serving.v2.inference import (
    RequestedOutput,
    V2Request,
    V2Response,
    check_num_tensors,
    check_request_id,
    refuse_shared_memory,
    requested_output,
)
from pagoda.serving.v2.tensors import Tensor, raw_from_tensor, tensor_from_raw, tensor_from_values, values_of

LENGTH_HEADER = "inference-header-content-length"
BINARY = "application/octet-stream"
BINARY_OUTPUT = "binary_data_output"


def decode_infer(
    body: bytes | bytearray, headers: Mapping[str, str], model_name: str, model_version: str | None, limits: JsonLimits
) -> V2Request:
    """The request in a body; raises `InvalidRequestError` or `NotSupportedError` for what does not fit."""
    json_length = headers.get(LENGTH_HEADER)
    end = len(body) if json_length is None else _json_end(json_length, len(body))
    content = parse_object(memoryview(body)[:end], limits)
    request_id = content.get("id") or ""
    if not isinstance(request_id, str):
        raise InvalidRequestError(f"id must be a string, got {shown(request_id)}", "id")
    reader = _BinaryReader(memoryview(body)[end:])
    inputs = [_decode_input(entry, reader) for entry in _objects(content.get("inputs"), "inputs")]
    reader.check_end()
    parameters = _parameters(content, "parameters")
    as_boolean(BINARY_OUTPUT, parameters.get(BINARY_OUTPUT, False))
    return V2Request(
        method="infer",
        model_name=model_name,
        model_version=model_version or "",
        request_id=check_request_id(request_id),
        inputs=inputs,
        parameters=parameters,
        outputs=tuple(_decode_output(entry) for entry in _objects(content.get("outputs") or [], "outputs")),
        timeout_seconds=parse_timeout_header(headers.get(TIMEOUT_HEADER)),
    )


def encode_infer(request: V2Request, response: V2Response) -> Response:
    """The response with each output in the form that `request` asks for."""
    all_binary = request.parameters.get(BINARY_OUTPUT, False)
    wanted = {output.name: output.binary_data for output in request.outputs}
    outputs: list[dict[str, Any]] = []
    pieces: list[bytes] = []
    for tensor in response.outputs:
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        is_binary = wanted.get(tensor.name)
        if all_binary if is_binary is None else is_binary:
            raw = raw_from_tensor(tensor)
            entry["parameters"] = {"binary_data_size": len(raw)}
            pieces.append(raw)
        else:
            entry["data"] = values_of(tensor.data)
        outputs.append(entry)
    content = {
        "model_name": response.model_name,
        "model_version": response.model_version,
        "id": response.request_id or uuid.uuid4().hex,
        "outputs": outputs,
    }
    if not pieces:
        return json_response(content)
    header = orjson.dumps(content)
    return Response(b"".join([header, *pieces]), headers={LENGTH_HEADER: str(len(header))}, media_type=BINARY)


class _BinaryReader:
    """The binary data behind the JSON, read in order."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._offset = 0

    def take(self, name: str, size: int) -> memoryview:
        if size > len(self._data) - self._offset:
            raise InvalidRequestError(
                f"input {shown(name)}: binary_data_size is {size}, but only {len(self._data) - self._offset} bytes "
                "are left in the body",
                name,
            )
        start, self._offset = self._offset, self._offset + size
        return self._data[start : self._offset]

    def check_end(self) -> None:
        left = len(self._data) - self._offset
        if left:
            raise InvalidRequestError(f"{left} bytes of binary data in the body belong to no input")


def _json_end(json_length: str, body_length: int) -> int:
    digits = json_length.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) < 19) or int(digits) > body_length:
        raise InvalidRequestError(
            f"Inference-Header-Content-Length must be an integer from 0 to the body's {body_length} bytes, "
            f"got {shown(json_length)}"
        )
    return int(digits)


def _objects(value: object, name: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        check_num_tensors(name, len(value))
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise InvalidRequestError(f"{name} must be a list of objects, got {shown(value)}", name)
    return value


def _parameters(holder: dict[str, Any], name: str) -> dict[str, Any]:
    value = holder.get("parameters")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{name} must be an object, got {shown(value)}", name)
    return value


def _decode_input(entry: dict[str, Any], reader: _BinaryReader) -> Tensor:
    name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    if not isinstance(name, str):
        raise InvalidRequestError(f"the name of an input must be a string, got {shown(name)}", "inputs")
    if not isinstance(datatype, str):
        raise InvalidRequestError(f"input {shown(name)}: datatype must be a string, got {shown(datatype)}", name)
    if not isinstance(shape, list):
        raise InvalidRequestError(f"input {shown(name)}: shape must be a list of integers, got {shown(shape)}", name)
    parameters = _parameters(entry, f"the parameters of input {shown(name)}")
    size = parameters.get("binary_data_size")
    refuse_shared_memory(name, parameters)
    if size is None and "data" not in entry:
        raise InvalidRequestError(f"input {shown(name)} has neither data nor binary_data_size", name)
    if size is not None and "data" in entry:
        raise InvalidRequestError(f"input {shown(name)} has both data and binary_data_size", name)
    if size is None:
        return tensor_from_values(name, datatype, shape, entry["data"])
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise InvalidRequestError(f"input {shown(name)}: binary_data_size must be an integer, got {shown(size)}", name)
    return tensor_from_raw(name, datatype, shape, reader.take(name, size))


def _decode_output(entry: dict[str, Any]) -> RequestedOutput:
    name = entry.get("name")
    if not isinstance(name, str):
        raise InvalidRequestError(f"the name of an output must be a string, got {shown(name)}", "outputs")
    return requested_output(name, _parameters(entry, f"the parameters of output {shown(name)}"))
