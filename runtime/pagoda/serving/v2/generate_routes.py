"""The routes of the generate extension, whole and as server-sent events."""

from __future__ import annotations

from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagoda.errors import InvalidRequestError
from pagoda.serving.context import ServingContext
from pagoda.serving.http.bodies import decode_body
from pagoda.serving.http.disconnect import until_disconnect
from pagoda.serving.http.documentation import event_stream, request_body
from pagoda.serving.http.event_stream import Events, EventTemplate, event, open_event_stream
from pagoda.serving.http.responses import json_response
from pagoda.serving.model_paths import V2_MODEL, V2_VERSION
from pagoda.serving.parameters import TIMEOUT_HEADER, parse_timeout_header
from pagoda.serving.v2.call import V2Call
from pagoda.serving.v2.errors import v2_errors, v2_stream_error
from pagoda.serving.v2.generate_codec import decode_generate, encode_result, envelope
from pagoda.serving.v2.schemas import GenerateRequest, GenerateResponse
from pagoda.serving.v2.service import V2Service
from pagoda.text.output import CompletionOutput


def generate_router(context: ServingContext, service: V2Service) -> APIRouter:
    """`generate` and `generate_stream` of the model."""
    router = APIRouter(tags=["generate"])
    errors = v2_errors(400, 401, 404, 413, 429, 500, 503, 504)
    body = request_body(GenerateRequest)
    stream = {200: event_stream("Each event is a GenerateResponse; the last one has the finish reason."), **errors}

    @router.post(f"{V2_MODEL}/generate", response_model=GenerateResponse, responses=errors, openapi_extra=body)
    @router.post(f"{V2_VERSION}/generate", response_model=GenerateResponse, responses=errors, openapi_extra=body)
    async def generate(request: Request, model_name: str, model_version: str | None = None) -> Response:
        """Complete one prompt."""
        call = await _prepare(request, model_name, model_version)
        ((result,),) = await until_disconnect(request, call.results())
        return json_response({**envelope(call), **encode_result(call, result)})

    @router.post(f"{V2_MODEL}/generate_stream", response_class=Response, responses=stream, openapi_extra=body)
    @router.post(f"{V2_VERSION}/generate_stream", response_class=Response, responses=stream, openapi_extra=body)
    async def generate_stream(request: Request, model_name: str, model_version: str | None = None) -> Response:
        """Complete one prompt in a stream."""
        call = await _prepare(request, model_name, model_version)
        return await open_event_stream(request, _events(call), v2_stream_error, context.metrics)

    async def _prepare(request: Request, model_name: str, model_version: str | None) -> V2Call:
        # Before the body is read.
        await service.wait_ready(model_name, model_version, parse_timeout_header(request.headers.get(TIMEOUT_HEADER)))
        headers, limits = request.headers, context.models.json_limits
        call = await decode_body(
            request,
            context.config.max_body_bytes,
            context.decoding,
            lambda body: service.prepare(decode_generate(body, headers, model_name, model_version, limits)),
        )
        if call.batch.jobs[0].params.n > 1:
            raise InvalidRequestError("n must be 1 here; infer and /v1/completions return several sequences", "n")
        return call

    return router


async def _events(call: V2Call) -> Events:
    so_far = CompletionOutput()
    members = envelope(call)
    text_event = EventTemplate(lambda text: {**members, "text_output": text})
    async with aclosing(call.stream()) as chunks:
        async for _, chunk in chunks:
            so_far.add(chunk)
            if chunk.finish_reason is not None:
                yield event({**members, **encode_result(call, so_far), "text_output": chunk.text})
            elif chunk.text:
                yield text_event(chunk.text)
