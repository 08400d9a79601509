"""/generate, /generate_stream, their common form at the root, and /info."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

import pagoda
from pagoda.sampling.params import MAX_STOP_STRINGS
from pagoda.serving.context import ServingContext
from pagoda.serving.generation import MAX_SEQUENCES_PER_REQUEST
from pagoda.serving.http.disconnect import until_disconnect
from pagoda.serving.http.documentation import event_stream, request_body
from pagoda.serving.http.event_stream import open_event_stream
from pagoda.serving.http.responses import json_response
from pagoda.serving.models import ServedModel
from pagoda.serving.openai.routes import EVENTS, read_request, requested_seconds
from pagoda.serving.tgi.call import TgiCall
from pagoda.serving.tgi.errors import tgi_error, tgi_errors
from pagoda.serving.tgi.types import TgiInfo, TgiRequest, TgiResponse


def tgi_router(context: ServingContext) -> APIRouter:
    """The routes of Text Generation Inference; `/health` and `/metrics` are the server's own."""
    router = APIRouter(tags=["tgi"])
    errors = tgi_errors(400, 401, 404, 413, 429, 500, 503, 504)
    body = request_body(TgiRequest)

    async def prepare(request: Request, streams: bool | None) -> tuple[TgiCall, bool]:
        seconds = requested_seconds(request)

        def checked(model: ServedModel, given: TgiRequest) -> tuple[TgiCall, bool]:
            if given.parameters is not None and given.parameters.adapter_id:
                model = context.models.find(given.parameters.adapter_id)
            is_stream = bool(given.stream) if streams is None else streams
            return TgiCall(model, given, seconds, streams=is_stream), is_stream

        return await read_request(context, request, TgiRequest, checked)

    async def streamed(request: Request, call: TgiCall) -> Response:
        return await open_event_stream(request, call.events(), tgi_error, context.metrics)

    @router.post("/generate", response_model=TgiResponse, responses=errors, openapi_extra=body)
    async def generate(request: Request) -> Response:
        """Complete one prompt."""
        call, _ = await prepare(request, False)
        return json_response(await until_disconnect(request, call.whole()))

    events: dict[int | str, dict[str, Any]] = {200: event_stream("Each event has one token; the last one the text.")}

    @router.post("/generate_stream", response_class=Response, responses={**events, **errors}, openapi_extra=body)
    async def generate_stream(request: Request) -> Response:
        """Complete one prompt in a stream."""
        call, _ = await prepare(request, True)
        return await streamed(request, call)

    @router.post(
        "/", response_model=list[TgiResponse], responses={200: {"content": EVENTS}, **errors}, openapi_extra=body
    )
    async def root(request: Request) -> Response:
        """Complete one prompt, in a stream where the body says `stream`; else a list of one."""
        call, is_stream = await prepare(request, None)
        if is_stream:
            return await streamed(request, call)
        return json_response([await until_disconnect(request, call.whole())])

    @router.get("/info", response_model=TgiInfo, responses=tgi_errors(401, 503))
    async def info() -> Response:
        """The model, and the limits of this server."""
        model = context.models.default
        model.health.check_ready()
        ready, config = model.ready, model.config
        assert ready is not None, "a ready server has a ready engine"
        return json_response(
            {
                "model_id": config.model or model.name,
                "model_sha": config.revision,
                "model_dtype": ready.dtype or config.dtype,
                "model_device_type": ready.device,
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": config.max_num_waiting,
                "max_best_of": 1,
                "max_stop_sequences": MAX_STOP_STRINGS,
                "max_input_tokens": ready.max_model_len - 1,
                "max_total_tokens": ready.max_model_len,
                "validation_workers": config.tokenizer_pool_size,
                "max_client_batch_size": MAX_SEQUENCES_PER_REQUEST,
                "router": "pagoda",
                "version": pagoda.__version__,
            }
        )

    return router
