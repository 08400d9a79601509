"""The methods of `inference.GRPCInferenceService`: protobuf messages in and out, errors raised as `PagodaError`.

How errors, keys and malformed messages are answered is `grpc_handlers`' business; how the port is served is `grpc_server`'s.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from pagoda import __version__
from pagoda.errors import InvalidRequestError, ModelNotFoundError, NotSupportedError, PagodaError
from pagoda.logs import request_id_var
from pagoda.serving.context import ServingContext
from pagoda.serving.generation import SequenceResult, limit_time
from pagoda.serving.grpc.codec import PieceEncoder, decode_request, encode_response
from pagoda.serving.grpc.messages import (
    ModelConfigResponse,
    ModelInferResponse,
    ModelMetadataResponse,
    ModelReadyResponse,
    ModelStreamInferResponse,
    RepositoryIndexResponse,
    RepositoryModelLoadResponse,
    ServerLiveResponse,
    ServerMetadataResponse,
    ServerReadyResponse,
)
from pagoda.serving.status import ErrorReport
from pagoda.serving.v2.inference import (
    INPUTS,
    MODEL_VERSION,
    OUTPUTS,
    PLATFORM,
    V2Batch,
    V2Request,
    output_tensors,
    parse_infer,
)
from pagoda.serving.v2.tensors import shown

EXTENSIONS = (
    "model_repository",
    "model_repository_extension",
    "binary_tensor_data",
    "parameters",
    "model_configuration",
)
MAX_REQUESTS_PER_STREAM = 256
"""Requests of one stream under way at once; more wait unread, which holds back the client."""
MAX_LOGGED_ID_CHARACTERS = 64
EMPTY_FINAL_RESPONSE = "triton_enable_empty_final_response"
FINAL_RESPONSE = "triton_final_response"
ERROR_CODE = "error_code"
"""Parameter of the response that ends a request inside a stream: the status it would have had as a call of its own."""


class ClientGoneError(Exception):
    """A response could not be written, because nobody reads this stream any more."""


class InferenceService:
    """One method for each RPC. `remaining` is the time the client waits, in seconds, None without a deadline."""

    def __init__(self, context: ServingContext, report_error: Callable[[Exception], ErrorReport]) -> None:
        """`report_error` records an error that is answered inside a stream, and returns what the client may know of it."""
        self._context = context
        self._report_error = report_error

    async def server_live(self, request: Any, remaining: float | None) -> Any:
        """Whether the process can still serve."""
        return ServerLiveResponse(live=self._context.health.is_live)

    async def server_ready(self, request: Any, remaining: float | None) -> Any:
        """Whether requests can be sent now."""
        return ServerReadyResponse(ready=self._context.health.is_ready)

    async def model_ready(self, request: Any, remaining: float | None) -> Any:
        """Whether the named model answers now; an unknown one is an error."""
        self._check_model(request.name, request.version)
        return ModelReadyResponse(ready=self._context.health.is_ready)

    async def server_metadata(self, request: Any, remaining: float | None) -> Any:
        """Name, version and extensions of the server."""
        return ServerMetadataResponse(name=PLATFORM, version=__version__, extensions=EXTENSIONS)

    async def model_metadata(self, request: Any, remaining: float | None) -> Any:
        """Inputs and outputs of the model."""
        self._check_model(request.name, request.version)
        return ModelMetadataResponse(
            name=self._context.model_name,
            versions=[MODEL_VERSION],
            platform=PLATFORM,
            inputs=INPUTS,
            outputs=OUTPUTS,
        )

    async def model_config(self, request: Any, remaining: float | None) -> Any:
        """What Triton's clients want to know before they stream."""
        self._check_model(request.name, request.version)
        response = ModelConfigResponse()
        config = response.config
        config.name, config.platform, config.backend = self._context.model_name, PLATFORM, PLATFORM
        config.model_transaction_policy.decoupled = True
        for tensor in INPUTS:
            config.input.add(
                name=tensor["name"], data_type=_triton_type(tensor["datatype"]), dims=tensor["shape"], optional=True
            )
        for tensor in OUTPUTS:
            config.output.add(name=tensor["name"], data_type=_triton_type(tensor["datatype"]), dims=tensor["shape"])
        return response

    async def repository_index(self, request: Any, remaining: float | None) -> Any:
        """The one model and its state."""
        health = self._context.health
        response = RepositoryIndexResponse()
        if health.is_ready:
            response.models.add(name=self._context.model_name, version=MODEL_VERSION, state="READY")
        elif not request.ready:
            state = "LOADING" if health.state == "starting" else "UNAVAILABLE"
            reason = health.cause or health.phase
            response.models.add(name=self._context.model_name, version=MODEL_VERSION, state=state, reason=reason)
        return response

    async def repository_model_load(self, request: Any, remaining: float | None) -> Any:
        """Confirms the model that is loaded; there is no loading of others."""
        self._check_model(request.model_name or request.name_or_repository, "")
        self._context.health.check_ready()
        return RepositoryModelLoadResponse(model_name=self._context.model_name, isLoaded=True)

    async def repository_model_unload(self, request: Any, remaining: float | None) -> Any:
        """Not offered: the process serves its one model until it ends."""
        self._check_model(request.model_name or request.name_or_repository, "")
        raise NotSupportedError("this server cannot unload its model; stop the process instead")

    async def model_infer(self, request: Any, remaining: float | None) -> Any:
        """One answer with every sequence in it."""
        request_id_var.set(_log_name(request))
        batch = self._parse(request, remaining)[1]
        if batch.stream:
            raise InvalidRequestError("stream is for ModelStreamInfer; ModelInfer gives one response", "stream")
        return await self._answer_whole(request, batch)

    async def model_stream_infer(
        self,
        requests: AsyncIterator[Any],
        write: Callable[[Any], Awaitable[None]],
        remaining: Callable[[], float | None],
    ) -> None:
        """Answer the requests of a stream side by side, each with responses in their own order.

        Returns when `requests` has ended and everything is answered; an error with which it ends is raised then. An error
        of one request is a response with `error_message`, and the stream goes on. `write` raises `ClientGoneError` when
        there is nobody to write to.
        """
        slots = asyncio.Semaphore(MAX_REQUESTS_PER_STREAM)
        broken_off: PagodaError | None = None

        async def answer(request: Any) -> None:
            request_id_var.set(_log_name(request))
            try:
                await self._answer_in_stream(request, remaining(), write)
            finally:
                slots.release()

        async with asyncio.TaskGroup() as group:
            try:
                async for request in requests:
                    await slots.acquire()
                    group.create_task(answer(request))
            except PagodaError as error:
                broken_off = error
        if broken_off is not None:
            raise broken_off

    async def _answer_in_stream(
        self, request: Any, remaining: float | None, write: Callable[[Any], Awaitable[None]]
    ) -> None:
        try:
            async with aclosing(self._responses(request, remaining)) as responses:
                async for response in responses:
                    await write(response)
        except ClientGoneError:
            return  # leaving the block above has aborted the request
        except Exception as error:  # whatever it is, this request ends with it and the stream goes on
            failure = self._report_error(error)
            failed = ModelInferResponse(model_name=request.model_name, id=request.id)
            failed.parameters[FINAL_RESPONSE].bool_param = True
            failed.parameters[ERROR_CODE].string_param = failure.grpc_code
            with suppress(ClientGoneError):
                await write(ModelStreamInferResponse(error_message=failure.message, infer_response=failed))

    async def _responses(self, request: Any, remaining: float | None) -> AsyncGenerator[Any, None]:
        """Stream responses (some as bytes): pieces as they come, or one whole where the client gave `stream` as false."""
        v2, batch = self._parse(request, remaining)
        has_empty_end = v2.parameters.get(EMPTY_FINAL_RESPONSE) is True
        if batch.stream or not _gives_stream(v2):
            async with aclosing(self._pieces(request, batch, has_empty_end)) as pieces:
                async for response in pieces:
                    yield response
        else:
            response = await self._answer_whole(request, batch)
            response.parameters[FINAL_RESPONSE].bool_param = not has_empty_end
            yield ModelStreamInferResponse(infer_response=response)
        if has_empty_end:
            end = encode_response(request, (), model_version=MODEL_VERSION, parameters={FINAL_RESPONSE: True})
            yield ModelStreamInferResponse(infer_response=end)

    async def _pieces(self, request: Any, batch: V2Batch, has_empty_end: bool) -> AsyncGenerator[Any, None]:
        """One response for each chunk: text, ids and log-probabilities are what is new, token counts are totals."""
        num_open = sum(job.params.n for job in batch.jobs)
        is_single = num_open == 1
        num_input_tokens: Counter[tuple[int, int]] = Counter()
        num_output_tokens: Counter[tuple[int, int]] = Counter()
        encoders: dict[tuple[int, int], PieceEncoder] = {}
        async with aclosing(self._context.runner.stream_all(batch.jobs, f"grpc-{uuid.uuid4().hex}")) as chunks:
            async for prompt_index, chunk in chunks:
                sequence = (prompt_index, chunk.index)
                num_output_tokens[sequence] += len(chunk.token_ids)
                if sequence in encoders and chunk.finish_reason is None and chunk.logprobs is None:
                    yield encoders[sequence].encode(chunk.text, chunk.token_ids, num_output_tokens[sequence])
                    continue
                piece = SequenceResult()
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
                response = encode_response(request, tensors, model_version=MODEL_VERSION, parameters=parameters)
                if chunk.finish_reason is None and chunk.logprobs is None:
                    encoders[sequence] = PieceEncoder(request, response, batch.output_names)
                yield ModelStreamInferResponse(infer_response=response)

    async def _answer_whole(self, request: Any, batch: V2Batch) -> Any:
        results = await self._context.runner.collect_all(batch.jobs, f"grpc-{uuid.uuid4().hex}")
        return encode_response(request, output_tensors(results, batch.output_names), model_version=MODEL_VERSION)

    def _parse(self, request: Any, remaining: float | None) -> tuple[V2Request, V2Batch]:
        """The request's jobs, none of them longer than the client waits."""
        self._check_model(request.model_name, request.model_version)
        self._context.health.check_ready()
        v2 = decode_request(request)
        batch = parse_infer(v2, self._context.generator.sampling_params)
        return v2, dataclasses.replace(batch, jobs=[limit_time(job, remaining) for job in batch.jobs])

    def _check_model(self, name: str, version: str) -> None:
        if name != self._context.model_name:
            raise ModelNotFoundError(f"model {shown(name)} is not served here; {self._context.model_name!r} is")
        if version not in ("", MODEL_VERSION):
            raise ModelNotFoundError(f"model {name!r} has no version {shown(version)}; it has {MODEL_VERSION!r}")


def _log_name(request: Any) -> str:
    """What the log lines of this request's task carry: the client's own id for it, cut to a bearable length."""
    return request.id[:MAX_LOGGED_ID_CHARACTERS] or uuid.uuid4().hex


def _gives_stream(request: V2Request) -> bool:
    return "stream" in request.parameters or any(tensor.name == "stream" for tensor in request.inputs)


def _triton_type(datatype: str) -> str:
    """Triton's name, in a model configuration, of a V2 datatype."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
