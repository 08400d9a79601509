"""The responses of a gRPC stream that are made by changing one message are those that are made anew."""

from __future__ import annotations

import pytest

from pagoda.serving.grpc.codec import InferMessage, PieceEncoder, encode_response
from pagoda.serving.grpc.messages import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from pagoda.serving.v2.inference import OUTPUT_NAMES, output_tensors
from pagoda.serving.v2.tensors import Tensor
from pagoda.text.output import CompletionOutput

PIECES = [(" grün", [5, 6]), ("", [7]), ("🙂\x00", [300, 2**31 - 1, 0]), ("", []), ("end", [1])]


def response_of(request: InferMessage, names: tuple[str, ...], text: str, token_ids: list[int], total: int) -> object:
    piece = CompletionOutput(pieces=[text], token_ids=token_ids, num_prompt_tokens=3)
    tensors = [
        Tensor(tensor.name, tensor.datatype, tensor.shape, [total]) if tensor.name == "num_output_tokens" else tensor
        for tensor in output_tensors([[piece]], names)
    ]
    parameters = {"triton_final_response": False, "sequence_index": 2}
    return encode_response(request, tensors, model_version="1", parameters=parameters)


@pytest.mark.parametrize("names", [OUTPUT_NAMES[:-1], OUTPUT_NAMES[::-1], ("output_ids",), ("finish_reason",)])
def test_a_changed_message_equals_a_new_one(names: tuple[str, ...]) -> None:
    request = InferMessage(ModelInferRequest(id="mine", model_name="demo"))
    total = 4
    first = response_of(request, names, "first", [9, 8, 7, 6], total)
    assert isinstance(first, ModelInferResponse)
    encoder = PieceEncoder(first, names)
    for text, token_ids in PIECES:
        total += len(token_ids)
        expected = response_of(request, names, text, token_ids, total)
        made = ModelStreamInferResponse.FromString(encoder.encode(text, token_ids, total))
        assert made == ModelStreamInferResponse(infer_response=expected)
