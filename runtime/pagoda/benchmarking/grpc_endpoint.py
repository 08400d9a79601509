"""V2 over gRPC: `ModelStreamInfer`, a stream of responses for one request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from typing_extensions import override

from pagoda.benchmarking.endpoints import Answer, Endpoint, RequestFailure, Target, joined
from pagoda.benchmarking.prompts import Content
from pagoda.serving.grpc.messages import SERVICE_NAME, ModelInferRequest, ModelStreamInferResponse

_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class V2Grpc(Endpoint):
    """`inference.GRPCInferenceService/ModelStreamInfer`; `target.base_url` is `HOST:PORT` or `grpc://HOST:PORT`."""

    def __init__(self, target: Target, timeout_seconds: float) -> None:
        self._target = target
        self._timeout_seconds = timeout_seconds
        address = target.base_url.removeprefix("grpc://").removeprefix("http://")
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stream = self._channel.stream_stream(
            f"/{SERVICE_NAME}/ModelStreamInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=ModelStreamInferResponse.FromString,
        )

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    @override
    async def send(self, prompt: tuple[Content, ...], output_tokens: int, on_piece: Callable[[], None]) -> Answer:
        request = self._request(joined(prompt), output_tokens)

        async def requests() -> AsyncIterator[Any]:
            yield request

        answer = Answer()
        metadata = tuple((name.lower(), value) for name, value in self._target.headers.items())
        call = self._stream(requests(), timeout=self._timeout_seconds, metadata=metadata)
        try:
            async for message in call:
                if message.error_message:
                    raise RequestFailure("error in stream", message.error_message)
                _take(message.infer_response, answer, on_piece)
        except grpc.aio.AioRpcError as error:
            kind = "timeout" if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else f"gRPC {error.code().name}"
            raise RequestFailure(kind, error.details() or "") from error
        finally:
            call.cancel()
        if not answer.ended:
            raise RequestFailure("incomplete", "the stream ended without a final response")
        return answer

    def _request(self, content: Content, output_tokens: int) -> Any:
        request = ModelInferRequest(model_name=self._target.model)
        if isinstance(content, str):
            tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
            tensor.contents.bytes_contents.append(content.encode())
        else:
            tensor = request.inputs.add(name="input_ids", datatype="INT64", shape=[len(content)])
            tensor.contents.int64_contents.extend(content)
        for name, value in {**self._target.sampling(output_tokens), **self._target.extra_body}.items():
            kinds = {bool: "bool_param", int: "int64_param", float: "double_param"}
            setattr(request.parameters[name], kinds.get(type(value), "string_param"), value)
        return request


def _take(response: Any, answer: Answer, on_piece: Callable[[], None]) -> None:
    outputs = {tensor.name: tensor for tensor in response.outputs}
    raw = dict(zip(outputs, response.raw_output_contents, strict=False))
    text = _text(outputs.get("text_output"), raw.get("text_output", b""))
    if text:
        answer.text += text
        answer.pieces += 1
        on_piece()
    # Both counts are totals so far.
    answer.output_tokens = _count(outputs, raw, "num_output_tokens") or answer.output_tokens
    answer.prompt_tokens = _count(outputs, raw, "num_input_tokens") or answer.prompt_tokens
    answer.ended |= response.parameters["triton_final_response"].bool_param


def _text(tensor: Any, raw: bytes) -> str:
    """The first string of a BYTES tensor; raw ones have four bytes of length before each."""
    if tensor is None:
        return ""
    content = raw[4:] if raw else b"".join(tensor.contents.bytes_contents[:1])
    return content.decode(errors="replace")


def _count(outputs: dict[str, Any], raw: dict[str, bytes], name: str) -> int | None:
    if name not in outputs:
        return None
    if raw.get(name):
        return int.from_bytes(raw[name][:8], "little")
    return int(outputs[name].contents.int64_contents[0])
