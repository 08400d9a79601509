"""The methods of `inference.GRPCInferenceService`: protobuf messages to and from `V2Service`, errors raised as `PagodaError`.

Statuses, keys and malformed messages are the business of `grpc.handlers`; how the port is served, of `grpc.server`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

from pagoda.errors import PagodaError
from pagoda.logs import request_id_var
from pagoda.serving.decoding_threads import DecodingThreads
from pagoda.serving.grpc.codec import InferMessage, PieceEncoder, decode_request, encode_response
from pagoda.serving.grpc.messages import (
    ModelConfigResponse,
    ModelInferResponse,
    ModelMetadataResponse,
    ModelReadyResponse,
    ModelStatisticsResponse,
    ModelStreamInferResponse,
    RepositoryIndexResponse,
    RepositoryModelLoadResponse,
    RepositoryModelUnloadResponse,
    ServerLiveResponse,
    ServerMetadataResponse,
    ServerReadyResponse,
)
from pagoda.serving.status import ErrorReport
from pagoda.serving.v2.call import V2Call
from pagoda.serving.v2.inference import output_tensors
from pagoda.serving.v2.service import V2Service
from pagoda.serving.v2.triton import statistics, triton_type
from pagoda.text.output import CompletionOutput

MAX_REQUESTS_PER_STREAM = 256
"""Requests of one stream that run at once; more wait unread, which slows the client down."""
MAX_LOGGED_ID_CHARACTERS = 64
EMPTY_FINAL_RESPONSE = "triton_enable_empty_final_response"
FINAL_RESPONSE = "triton_final_response"
ERROR_CODE = "error_code"
"""Parameter of the response that ends a request inside a stream: the status it would have had as a call of its own."""


class ClientGoneError(Exception):
    """A response could not be written: the client has left the stream, or has stopped reading it."""


class InferenceService:
    """One method for each RPC. `remaining` is the time the client waits, in seconds, None without a deadline."""

    def __init__(
        self, service: V2Service, decoding: DecodingThreads, report_error: Callable[[Exception], ErrorReport]
    ) -> None:
        """`report_error` counts and logs an error that ends one request of a stream, and returns its report for the client."""
        self._service = service
        self._decoding = decoding
        self._report_error = report_error

    async def server_live(self, request: Any, remaining: float | None) -> Any:
        """Whether the process can still become ready."""
        return ServerLiveResponse(live=self._service.is_live)

    async def server_ready(self, request: Any, remaining: float | None) -> Any:
        """Whether requests sent now would be accepted."""
        return ServerReadyResponse(ready=self._service.is_ready)

    async def model_ready(self, request: Any, remaining: float | None) -> Any:
        """Whether a request to the model would be accepted; an unknown model is an error."""
        return ModelReadyResponse(ready=self._service.find(request.name, request.version).health.is_ready)

    async def server_metadata(self, request: Any, remaining: float | None) -> Any:
        """Name, version and extensions of the server."""
        return ServerMetadataResponse(**dataclasses.asdict(self._service.metadata("model_configuration")))

    async def model_metadata(self, request: Any, remaining: float | None) -> Any:
        """Inputs and outputs of the model."""
        return ModelMetadataResponse(**dataclasses.asdict(self._service.model_metadata(request.name, request.version)))

    async def model_config(self, request: Any, remaining: float | None) -> Any:
        """What Triton's clients ask before they stream."""
        model = self._service.model_metadata(request.name, request.version)
        response = ModelConfigResponse()
        config = response.config
        config.name, config.platform, config.backend = model.name, model.platform, model.platform
        config.model_transaction_policy.decoupled = True
        for tensor in model.inputs:
            config.input.add(
                name=tensor["name"], data_type=triton_type(tensor["datatype"]), dims=tensor["shape"], optional=True
            )
        for tensor in model.outputs:
            config.output.add(name=tensor["name"], data_type=triton_type(tensor["datatype"]), dims=tensor["shape"])
        return response

    async def model_statistics(self, request: Any, remaining: float | None) -> Any:
        """Triton's statistics of a model, or of every one."""
        names = [request.name] if request.name else [state.name for state in self._service.index()]
        found = [statistics(self._service, name, request.version or None) for name in names]
        for one in found:
            del one["batch_stats"]  # there are none
        return ModelStatisticsResponse(model_stats=found)

    async def repository_index(self, request: Any, remaining: float | None) -> Any:
        """Every model with its state."""
        response = RepositoryIndexResponse()
        for state in self._service.index(only_ready=request.ready):
            response.models.add(**dataclasses.asdict(state))
        return response

    async def repository_model_load(self, request: Any, remaining: float | None) -> Any:
        """Success once the model is loaded; the parameter `config` has settings for as long as it is."""
        name, parameters = request.model_name or request.name_or_repository, _values(request.parameters)
        model = await self._service.load(name, parameters)
        return RepositoryModelLoadResponse(model_name=model.name, isLoaded=True)

    async def repository_model_unload(self, request: Any, remaining: float | None) -> Any:
        """Success once the model is unloaded, of several; the only model lives as long as the server."""
        name, parameters = request.model_name or request.name_or_repository, _values(request.parameters)
        model = await self._service.unload(name, parameters)
        return RepositoryModelUnloadResponse(model_name=model.name, isUnloaded=True)

    async def model_infer(self, request: InferMessage, remaining: float | None) -> Any:
        """One response with every sequence in it."""
        request_id_var.set(_log_name(request))
        return await self._infer(request, await self._prepare(request, remaining))

    async def model_stream_infer(
        self,
        requests: AsyncIterator[InferMessage],
        write: Callable[[Any], Awaitable[None]],
        remaining: Callable[[], float | None],
    ) -> None:
        """Run the requests of a stream side by side, each with its responses in order.

        Returns when `requests` has ended and all their responses are written; an error with which it ended is raised then. An
        error of one request is a response with `error_message`, and the stream goes on. `write` raises `ClientGoneError` when
        the client has left or stopped reading.
        """
        slots = asyncio.Semaphore(MAX_REQUESTS_PER_STREAM)
        stream_error: PagodaError | None = None

        async def respond(request: InferMessage) -> None:
            request_id_var.set(_log_name(request))
            try:
                await self._respond_in_stream(request, remaining(), write)
            finally:
                slots.release()

        async with asyncio.TaskGroup() as group:
            try:
                async for request in requests:
                    try:
                        await slots.acquire()
                    except BaseException:  # raised on: there is no task that gives its memory back
                        request.release()
                        raise
                    # Also where it is cancelled before it has begun.
                    group.create_task(respond(request)).add_done_callback(partial(_release, request))
            except PagodaError as error:
                stream_error = error
        if stream_error is not None:
            raise stream_error

    async def _respond_in_stream(
        self, request: InferMessage, remaining: float | None, write: Callable[[Any], Awaitable[None]]
    ) -> None:
        try:
            async with aclosing(self._responses(request, remaining)) as responses:
                async for response in responses:
                    await write(response)
        except ClientGoneError:
            return  # leaving the block above has aborted the request
        except Exception as error:  # whatever it is, this request ends with it and the stream goes on
            failure = self._report_error(error)
            failed = ModelInferResponse(model_name=request.head.model_name, id=request.head.id)
            failed.parameters[FINAL_RESPONSE].bool_param = True
            failed.parameters[ERROR_CODE].string_param = failure.grpc_code
            with suppress(ClientGoneError):
                await write(ModelStreamInferResponse(error_message=failure.message, infer_response=failed))

    async def _responses(self, request: InferMessage, remaining: float | None) -> AsyncGenerator[Any, None]:
        """Stream responses (some as bytes): chunks as they come, or one whole where the client gave `stream` as false."""
        call = await self._prepare(request, remaining)
        has_empty_end = call.request.parameters.get(EMPTY_FINAL_RESPONSE) is True
        if call.request.gives("stream") and not call.batch.stream:
            response = await self._infer(request, call)
            response.parameters[FINAL_RESPONSE].bool_param = not has_empty_end
            yield ModelStreamInferResponse(infer_response=response)
        else:
            async with aclosing(self._pieces(request, call, has_empty_end)) as pieces:
                async for response in pieces:
                    yield response
        if has_empty_end:
            end = encode_response(request, (), model_version=call.model.version, parameters={FINAL_RESPONSE: True})
            yield ModelStreamInferResponse(infer_response=end)

    async def _pieces(self, request: InferMessage, call: V2Call, has_empty_end: bool) -> AsyncGenerator[Any, None]:
        """One response for each chunk: text, ids and log-probabilities are what is new, token counts are totals."""
        batch = call.batch
        num_open = sum(job.params.n for job in batch.jobs)
        is_single = num_open == 1
        num_input_tokens: Counter[tuple[int, int]] = Counter()
        num_output_tokens: Counter[tuple[int, int]] = Counter()
        encoders: dict[tuple[int, int], PieceEncoder] = {}
        async with aclosing(call.stream()) as chunks:
            async for prompt_index, chunk in chunks:
                sequence = (prompt_index, chunk.index)
                num_output_tokens[sequence] += len(chunk.token_ids)
                if sequence in encoders and chunk.finish_reason is None and chunk.logprobs is None:
                    yield encoders[sequence].encode(chunk.text, chunk.token_ids, num_output_tokens[sequence])
                    continue
                piece = CompletionOutput()
                piece.add(chunk)
                num_input_tokens[sequence] += piece.num_prompt_tokens
                piece.num_prompt_tokens = num_input_tokens[sequence]
                num_open -= chunk.finish_reason is not None
                tensors = [
                    dataclasses.replace(tensor, data=[num_output_tokens[sequence]])
                    if tensor.name == "num_output_tokens"
                    else tensor
                    for tensor in output_tensors([[piece]], batch.output_names)
                ]
                parameters: dict[str, bool | int] = {FINAL_RESPONSE: num_open == 0 and not has_empty_end}
                if not is_single:
                    parameters |= {"prompt_index": prompt_index, "sequence_index": chunk.index}
                response = encode_response(request, tensors, model_version=call.model.version, parameters=parameters)
                if chunk.finish_reason is None and chunk.logprobs is None:
                    encoders[sequence] = PieceEncoder(response, batch.output_names)
                yield ModelStreamInferResponse(infer_response=response)

    async def _infer(self, request: InferMessage, call: V2Call) -> Any:
        response = await call.infer()
        return encode_response(request, response.outputs, model_version=response.model_version)

    async def _prepare(self, request: InferMessage, remaining: float | None) -> V2Call:
        size = sum(map(len, request.raw_contents)) or request.head.ByteSize()
        try:
            # Before the tensors are decoded.
            await self._service.wait_ready(request.head.model_name, request.head.model_version, remaining)
            return await self._decoding.run(size, lambda: self._service.prepare(decode_request(request, remaining)))
        finally:
            request.release()


def _values(parameters: Any) -> dict[str, object]:
    """The parameters of a load or an unload as Python values."""
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "bool_param") for name, value in parameters.items()
    }


def _release(request: InferMessage, _: object) -> None:
    request.release()


def _log_name(request: InferMessage) -> str:
    """The request id in the log lines of this request's task: the client's own, cut to a bounded length."""
    return request.head.id[:MAX_LOGGED_ID_CHARACTERS] or uuid.uuid4().hex
