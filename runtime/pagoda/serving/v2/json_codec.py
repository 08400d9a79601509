"""V2 infer requests and responses on the REST wire: JSON, with tensors in it or as binary data behind it.

Binary data follows Triton's binary tensor extension: the header `Inference-Header-Content-Length` says where the JSON ends,
and the data of the tensors that have a `binary_data_size` lie behind it in order. The form of an output is what
`binary_data` of the requested output says, else what `binary_data_output` of the request says, else JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from kserve import InferInput, InferRequest, InferResponse
from kserve.protocol.infer_type import InferOutput, RequestedOutput
from starlette.responses import Response

from pagoda.errors import InvalidRequestError, NotSupportedError
from pagoda.serving.http.bodies import parse_object
from pagoda.serving.http.responses import json_response
from pagoda.serving.parameters import as_boolean
from pagoda.serving.v2.tensors import Tensor, raw_from_tensor, shown

LENGTH_HEADER = "inference-header-content-length"
BINARY = "application/octet-stream"


def decode_infer(body: bytes, json_length: str | None, model_name: str) -> InferRequest:
    """KServe's request from a body; tensors are checked for structure here and for their content by `serving.v2.inference`."""
    end = len(body) if json_length is None else _json_end(json_length, len(body))
    content = parse_object(body[:end])
    request_id = content.get("id") or ""
    if not isinstance(request_id, str):
        raise InvalidRequestError(f"id must be a string, got {shown(request_id)}", "id")
    reader = _BinaryReader(memoryview(body)[end:])
    inputs = [_decode_input(entry, reader) for entry in _objects(content.get("inputs"), "inputs")]
    reader.check_end()
    outputs = [_decode_output(entry) for entry in _objects(content.get("outputs") or [], "outputs")]
    return InferRequest(
        model_name=model_name,
        request_id=request_id,
        infer_inputs=inputs,
        parameters=_parameters(content, "parameters"),
        request_outputs=outputs or None,
    )


def encode_infer(request: InferRequest, response: InferResponse) -> Response:
    """The answer with each output in the form that `request` asks for."""
    all_binary = as_boolean("binary_data_output", (request.parameters or {}).get("binary_data_output", False))
    wanted = {output.name: output.binary_data for output in request.request_outputs or ()}
    outputs: list[dict[str, Any]] = []
    pieces: list[bytes] = []
    for output in response.outputs:
        entry: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        is_binary = wanted.get(output.name)
        if all_binary if is_binary is None else is_binary:
            raw = raw_from_tensor(Tensor(output.name, output.datatype, tuple(output.shape), output.data))
            entry["parameters"] = {"binary_data_size": len(raw)}
            pieces.append(raw)
        else:
            entry["data"] = output.data
        outputs.append(entry)
    content = {
        "model_name": response.model_name,
        "model_version": response.model_version,
        "id": response.id,
        "outputs": outputs,
    }
    if not pieces:
        return json_response(content)
    head = orjson.dumps(content)
    return Response(b"".join([head, *pieces]), headers={LENGTH_HEADER: str(len(head))}, media_type=BINARY)


def infer_outputs(tensors: Sequence[Tensor]) -> list[InferOutput]:
    """Output tensors in KServe's type."""
    return [InferOutput(tensor.name, list(tensor.shape), tensor.datatype, data=tensor.data) for tensor in tensors]


class _BinaryReader:
    """Hands out the binary data behind the JSON, piece by piece."""

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


def _decode_input(entry: dict[str, Any], reader: _BinaryReader) -> InferInput:
    name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    if not isinstance(name, str):
        raise InvalidRequestError(f"the name of an input must be a string, got {shown(name)}", "inputs")
    if not isinstance(datatype, str):
        raise InvalidRequestError(f"input {shown(name)}: datatype must be a string, got {shown(datatype)}", name)
    if not isinstance(shape, list):
        raise InvalidRequestError(f"input {shown(name)}: shape must be a list of integers, got {shown(shape)}", name)
    parameters = _parameters(entry, f"the parameters of input {shown(name)}")
    size = parameters.get("binary_data_size")
    if any(key.startswith("shared_memory") for key in parameters):
        raise NotSupportedError(f"input {shown(name)}: shared memory is not supported")
    if size is None and "data" not in entry:
        raise InvalidRequestError(f"input {shown(name)} has neither data nor binary_data_size", name)
    if size is not None and "data" in entry:
        raise InvalidRequestError(f"input {shown(name)} has both data and binary_data_size", name)
    tensor = InferInput(name, shape, datatype, data=entry.get("data"), parameters=parameters)
    if size is not None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise InvalidRequestError(
                f"input {shown(name)}: binary_data_size must be an integer, got {shown(size)}", name
            )
        tensor._raw_data = reader.take(name, size)
    return tensor


def _decode_output(entry: dict[str, Any]) -> RequestedOutput:
    name = entry.get("name")
    if not isinstance(name, str):
        raise InvalidRequestError(f"the name of an output must be a string, got {shown(name)}", "outputs")
    return RequestedOutput(name, _parameters(entry, f"the parameters of output {shown(name)}"))
