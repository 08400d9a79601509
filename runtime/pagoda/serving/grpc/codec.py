"""V2 protobuf messages to checked V2 requests, and output tensors to V2 protobuf messages.

Tensors come as typed `contents` or as `raw_input_contents`, never both. Outputs are always `raw_output_contents`, as those of
Triton are: tritonclient reads numbers from nothing else, and V2 allows raw contents for all outputs or for none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pagoda.errors import InvalidRequestError, shown
from pagoda.serving.grpc.messages import ModelInferResponse, ModelStreamInferResponse
from pagoda.serving.v2.inference import (
    V2Request,
    check_num_tensors,
    check_request_id,
    refuse_shared_memory,
    requested_output,
)
from pagoda.serving.v2.tensors import (
    BYTES,
    DATATYPES,
    INTEGER_DATATYPES,
    Tensor,
    raw_from_tensor,
    tensor_from_integers,
    tensor_from_raw,
    tensor_from_values,
)

CONTENTS_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}
"""Where each datatype's values lie; FP16 has no field and travels raw only."""
_INTEGERS = {
    "int_contents": np.int32,
    "int64_contents": np.int64,
    "uint_contents": np.uint32,
    "uint64_contents": np.uint64,
}
FEW_NUMBERS = 2**13
"""More of them are taken out of a message in pieces, into an array."""
_CHANGING_OUTPUTS = frozenset({"text_output", "output_ids", "num_output_tokens"})
"""What differs between two pieces of a sequence that goes on."""


class InferMessage:
    """A `ModelInferRequest`, and its raw contents where they are not in it: a large message is not copied.

    `on_release`: called when the message is not needed any more, at least once.
    """

    __slots__ = ("_on_release", "head", "raw_contents")

    def __init__(
        self,
        head: Any,
        raw_contents: Sequence[bytes | memoryview] = (),
        on_release: Callable[[], None] = lambda: None,
    ) -> None:
        self.head = head
        self.raw_contents: Sequence[bytes | memoryview] = raw_contents or head.raw_input_contents
        self._on_release = on_release

    def release(self) -> None:
        """The contents were decoded, or will not be; what is left is what responses repeat. May be called twice."""
        self.raw_contents = ()
        self._on_release()


def decode_request(request: InferMessage, timeout_seconds: float | None) -> V2Request:
    """A request whose client waits `timeout_seconds`; raises `InvalidRequestError` for what does not fit."""
    message, raw = request.head, request.raw_contents
    check_num_tensors("inputs", len(message.inputs))
    check_num_tensors("outputs", len(message.outputs))
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequestError(
            f"raw_input_contents has {len(raw)} entries for {len(message.inputs)} inputs; one for each is needed",
            "inputs",
        )
    inputs = []
    for index, tensor in enumerate(message.inputs):
        refuse_shared_memory(tensor.name, tensor.parameters)
        if not raw:
            inputs.append(_tensor_from_contents(tensor))
        elif tensor.HasField("contents"):
            raise InvalidRequestError(
                f"input {shown(tensor.name)}: contents must be left out when raw_input_contents is used", tensor.name
            )
        else:
            inputs.append(tensor_from_raw(tensor.name, tensor.datatype, tensor.shape, raw[index]))
    return V2Request(
        method="grpc",
        model_name=message.model_name,
        model_version=message.model_version,
        request_id=check_request_id(message.id),
        inputs=inputs,
        parameters=decode_parameters(message.parameters),
        outputs=tuple(
            requested_output(output.name, decode_parameters(output.parameters)) for output in message.outputs
        ),
        timeout_seconds=timeout_seconds,
    )


def decode_parameters(parameters: Mapping[str, Any]) -> dict[str, object]:
    """`InferParameter`s as plain values; one that holds no value is an error."""
    values: dict[str, object] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidRequestError(f"parameter {shown(name)} has no value", name)
        values[name] = getattr(parameter, choice)
    return values


def encode_response(
    request: InferMessage,
    tensors: Sequence[Tensor],
    *,
    model_version: str,
    parameters: Mapping[str, bool | int] | None = None,
) -> Any:
    """The `ModelInferResponse` to `request` that carries `tensors`."""
    response = ModelInferResponse(model_name=request.head.model_name, model_version=model_version, id=request.head.id)
    for tensor in tensors:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        response.raw_output_contents.append(raw_from_tensor(tensor))
    for name, value in (parameters or {}).items():
        parameter = response.parameters[name]
        if isinstance(value, bool):
            parameter.bool_param = value
        else:
            parameter.int64_param = value
    return response


class PieceEncoder:
    """The responses of a stream to one sequence that bring nothing but tokens: one message, changed where they differ.

    `first` is the `ModelInferResponse` with the sequence's first piece; `names` are its outputs.
    """

    def __init__(self, first: Any, names: Sequence[str]) -> None:
        self._response = ModelStreamInferResponse(infer_response=first)
        self._places = {name: index for index, name in enumerate(names) if name in _CHANGING_OUTPUTS}

    def encode(self, text: str, token_ids: list[int], num_output_tokens: int) -> bytes:
        """The serialized `ModelStreamInferResponse` for the next piece; `num_output_tokens` is the total."""
        inner = self._response.infer_response
        for name, place in self._places.items():
            output = inner.outputs[place]
            if name == "text_output":
                data: list[Any] = [text.encode()]
            elif name == "output_ids":
                data = token_ids
                output.shape[-1] = len(token_ids)
            else:
                data = [num_output_tokens]
            tensor = Tensor(name, output.datatype, tuple(output.shape), data)
            inner.raw_output_contents[place] = raw_from_tensor(tensor)
        serialized: bytes = self._response.SerializeToString()
        return serialized


def _tensor_from_contents(tensor: Any) -> Tensor:
    field = CONTENTS_FIELDS.get(tensor.datatype)
    if field is None and tensor.datatype in DATATYPES:
        raise InvalidRequestError(
            f"input {shown(tensor.name)}: {tensor.datatype} has no typed contents; send raw_input_contents", tensor.name
        )
    for descriptor, _ in tensor.contents.ListFields():
        if field is not None and descriptor.name != field:
            raise InvalidRequestError(
                f"input {shown(tensor.name)}: the contents of {tensor.datatype} belong in {field}, got {descriptor.name}",
                tensor.name,
            )
    # An unknown datatype goes on with no values: the tensor's own check names the known ones.
    values = [] if field is None else getattr(tensor.contents, field)
    if field is not None and tensor.datatype in INTEGER_DATATYPES and len(values) > FEW_NUMBERS:
        pieces = [
            np.array(values[start : start + FEW_NUMBERS], _INTEGERS[field])
            for start in range(0, len(values), FEW_NUMBERS)
        ]
        return tensor_from_integers(tensor.name, tensor.datatype, tensor.shape, np.concatenate(pieces))
    values = list(values)
    return tensor_from_values(tensor.name, tensor.datatype, tensor.shape, values)
