"""The generate extension (Triton's shape): one prompt in plain JSON, answered whole or as server-sent events."""

from __future__ import annotations

import uuid
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagoda.errors import InvalidRequestError
from pagoda.request import GenerationRequest
from pagoda.serving.context import ServingContext
from pagoda.serving.generation import limit_time
from pagoda.serving.http.bodies import read_object
from pagoda.serving.http.disconnect import until_disconnect
from pagoda.serving.http.documentation import event_stream, request_body, v2_errors
from pagoda.serving.http.event_stream import Events, EventTemplate, event, open_event_stream
from pagoda.serving.http.responses import json_response, v2_stream_error
from pagoda.serving.kserve.model import EngineDataPlane
from pagoda.serving.parameters import TIMEOUT_HEADER, parse_timeout_header
from pagoda.serving.v2.inference import MODEL_VERSION, logprobs_json, parse_generate
from pagoda.serving.v2.routes import MODEL, VERSION
from pagoda.serving.v2.schemas import GenerateRequest, GenerateResponse
from pagoda.serving.v2.tensors import shown
from pagoda.text.output import CompletionOutput


def generate_router(context: ServingContext, plane: EngineDataPlane) -> APIRouter:
    """`generate` and `generate_stream` of the model."""
    router = APIRouter(tags=["generate"])
    errors = v2_errors(400, 401, 404, 413, 429, 500, 501, 503, 504)
    body = request_body(GenerateRequest)
    stream = {200: event_stream("Each event is a GenerateResponse; the last one has the finish reason."), **errors}

    @router.post(f"{MODEL}/generate", response_model=GenerateResponse, responses=errors, openapi_extra=body)
    @router.post(f"{VERSION}/generate", response_model=GenerateResponse, responses=errors, openapi_extra=body)
    async def generate(request: Request, model_name: str, model_version: str | None = None) -> Response:
        """Complete one prompt."""
        head, job = await _read(request, model_name, model_version)
        if job.stream:
            raise InvalidRequestError("generate does not stream; use generate_stream", "stream")
        work = context.runner.collect(job, f"generate-{uuid.uuid4().hex}")
        results = await until_disconnect(request, work)
        return json_response({**head, **_whole(job, results[0])})

    @router.post(f"{MODEL}/generate_stream", response_class=Response, responses=stream, openapi_extra=body)
    @router.post(f"{VERSION}/generate_stream", response_class=Response, responses=stream, openapi_extra=body)
    async def generate_stream(request: Request, model_name: str, model_version: str | None = None) -> Response:
        """Complete one prompt, piece by piece."""
        head, job = await _read(request, model_name, model_version)
        return await open_event_stream(request, _events(head, job), v2_stream_error, context.metrics)

    async def _read(
        request: Request, model_name: str, model_version: str | None
    ) -> tuple[dict[str, Any], GenerationRequest]:
        plane.check_version(model_version)
        await plane.get_model(model_name)
        content = await read_object(request, context.config.max_body_bytes)
        request_id = content.get("id")
        if request_id is not None and not isinstance(request_id, str):
            raise InvalidRequestError(f"id must be a string, got {shown(request_id)}", "id")
        job = parse_generate(content, context.generator.sampling_params)
        job = limit_time(job, parse_timeout_header(request.headers.get(TIMEOUT_HEADER)))
        head = {"id": request_id} if request_id is not None else {}
        return {**head, "model_name": model_name, "model_version": MODEL_VERSION}, job

    async def _events(head: dict[str, Any], job: GenerationRequest) -> Events:
        so_far = CompletionOutput()
        piece = EventTemplate(lambda text: {**head, "text_output": text})
        async with aclosing(context.runner.stream(job, f"generate-{uuid.uuid4().hex}")) as chunks:
            async for chunk in chunks:
                so_far.add(chunk)
                if chunk.finish_reason is not None:
                    yield event({**head, **_whole(job, so_far), "text_output": chunk.text})
                elif chunk.text:
                    yield piece(chunk.text)

    return router


def _whole(job: GenerationRequest, result: CompletionOutput) -> dict[str, Any]:
    """The members of an answer that describe a finished sequence."""
    content: dict[str, Any] = {
        "text_output": result.text,
        "finish_reason": result.finish_reason,
        "num_input_tokens": result.num_prompt_tokens,
        "num_output_tokens": len(result.token_ids),
    }
    if job.details:
        content["details"] = {
            "finish_reason": result.finish_reason,
            "stop_reason": result.stop_reason,
            "output_ids": result.token_ids,
            "logprobs": None if result.logprobs is None else logprobs_json(result.logprobs),
            "num_cached_tokens": result.num_cached_tokens,
        }
    return content
