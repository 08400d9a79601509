"""The Open Inference Protocol (V2) over REST, and Triton's repository extension."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagoda.errors import InvalidRequestError
from pagoda.serving.auth.api_keys import caller_var
from pagoda.serving.auth.scopes import Access
from pagoda.serving.context import ServingContext
from pagoda.serving.http.bodies import decode_body, parse_object
from pagoda.serving.http.disconnect import until_disconnect
from pagoda.serving.http.documentation import request_body
from pagoda.serving.http.responses import json_response
from pagoda.serving.model_paths import MODEL_NAME, V2_MODEL, V2_VERSION
from pagoda.serving.parameters import TIMEOUT_HEADER, parse_timeout_header
from pagoda.serving.v2.errors import v2_errors
from pagoda.serving.v2.json_codec import decode_infer, encode_infer
from pagoda.serving.v2.schemas import (
    InferenceRequest,
    InferenceResponse,
    LiveResponse,
    LoadResponse,
    ModelMetadataResponse,
    ModelReadyResponse,
    ReadyResponse,
    RepositoryEntry,
    ServerMetadataResponse,
    UnloadResponse,
)
from pagoda.serving.v2.service import V2Service
from pagoda.serving.v2.triton import model_config, statistics


def v2_router(context: ServingContext, service: V2Service) -> APIRouter:
    """Metadata, health and infer, of the model with and without a version in the path."""
    router = APIRouter(tags=["v2"])
    health = context.health

    @router.get("/v2", response_model=ServerMetadataResponse)
    @router.get("/v2/", include_in_schema=False)
    async def server_metadata() -> Response:
        """Name, version and extensions of the server."""
        return json_response(service.metadata("generate"))

    @router.get("/v2/health/live", response_model=LiveResponse, responses={503: {"model": LiveResponse}})
    async def live() -> Response:
        """200 unless the engine is dead: a server that loads or drains is live."""
        if service.is_live:
            return json_response({"live": True})
        may_read = Access.READ.admits(caller_var.get().scopes)
        return json_response({"live": False, "error": f"dead: {health.cause}" if may_read else "dead"}, 503)

    @router.get("/v2/health/ready", response_model=ReadyResponse, responses={503: {"model": ReadyResponse}})
    async def ready() -> Response:
        """200 while a request sent now would be accepted."""
        if service.is_ready:
            return json_response({"ready": True})
        reason = ", ".join(dict.fromkeys([str(health.state), health.phase]))
        return json_response({"ready": False, "error": f"not ready: {reason}"}, 503)

    @router.get(f"{V2_MODEL}/ready", response_model=ModelReadyResponse, responses=v2_errors(404, 503))
    @router.get(f"{V2_VERSION}/ready", response_model=ModelReadyResponse, responses=v2_errors(404, 503))
    async def model_ready(model_name: str, model_version: str | None = None) -> Response:
        """200 while a request to the model would be accepted."""
        return json_response({"name": service.find_ready(model_name, model_version).name, "ready": True})

    errors = v2_errors(400, 401, 404, 413, 429, 500, 503, 504)
    body = request_body(InferenceRequest)

    @router.post(f"{V2_MODEL}/infer", response_model=InferenceResponse, responses=errors, openapi_extra=body)
    @router.post(f"{V2_VERSION}/infer", response_model=InferenceResponse, responses=errors, openapi_extra=body)
    async def infer(request: Request, model_name: str, model_version: str | None = None) -> Response:
        """Generate for a batch of prompts; tensors as JSON or as binary data behind it."""
        await service.wait_ready(model_name, model_version, requested_seconds(request))  # before the body is read
        headers, limits = request.headers, context.models.json_limits
        call = await decode_body(
            request,
            context.config.max_body_bytes,
            context.decoding,
            lambda body: service.prepare(decode_infer(body, headers, model_name, model_version, limits)),
        )
        return encode_infer(call.request, await until_disconnect(request, call.infer()))

    @router.get(f"{V2_MODEL}/config", responses=v2_errors(401, 404))
    @router.get(f"{V2_VERSION}/config", responses=v2_errors(401, 404))
    async def config(model_name: str, model_version: str | None = None) -> dict[str, Any]:
        """Triton's model configuration."""
        return model_config(service.model_metadata(model_name, model_version))

    # Before the paths with a name, which would match it.
    @router.get("/v2/models/stats", responses=v2_errors(401))
    async def stats_of_all() -> dict[str, Any]:
        """Triton's statistics of every model."""
        return {"model_stats": [statistics(service, state.name, None) for state in service.index()]}

    @router.get(f"{V2_MODEL}/stats", responses=v2_errors(401, 404))
    @router.get(f"{V2_VERSION}/stats", responses=v2_errors(401, 404))
    async def stats(model_name: str, model_version: str | None = None) -> dict[str, Any]:
        """Triton's statistics of the model: requests that have ended, and their times."""
        return {"model_stats": [statistics(service, model_name, model_version)]}

    # After the longer paths, which it would match too; the lower one is added first.
    @router.get(V2_MODEL, response_model=ModelMetadataResponse, responses=v2_errors(401, 404))
    @router.get(V2_VERSION, response_model=ModelMetadataResponse, responses=v2_errors(401, 404))
    async def model_metadata(model_name: str, model_version: str | None = None) -> Response:
        """Inputs and outputs of the model."""
        return json_response(service.model_metadata(model_name, model_version))

    return router


def requested_seconds(request: Request) -> float | None:
    """The time that the client's header allows."""
    return parse_timeout_header(request.headers.get(TIMEOUT_HEADER))


def repository_router(context: ServingContext, service: V2Service) -> APIRouter:
    """Triton's repository extension."""
    router = APIRouter(prefix="/v2/repository", tags=["repository"])

    @router.post("/index", response_model=list[RepositoryEntry], responses=v2_errors(400, 401))
    async def index(request: Request) -> Response:
        """Every model with its state; `{"ready": true}` leaves out what is not ready."""
        content = await _optional_object(request)
        only_ready = content.get("ready", False)
        if not isinstance(only_ready, bool):
            raise InvalidRequestError("ready must be true or false", "ready")
        return json_response(service.index(only_ready=only_ready))

    @router.post(f"/models/{MODEL_NAME}/load", response_model=LoadResponse, responses=v2_errors(400, 401, 404, 503))
    async def load(request: Request, model_name: str) -> Response:
        """Success once the model is loaded; `parameters.config` has settings for as long as it is."""
        model = await service.load(model_name, await _parameters(request))
        return json_response({"name": model.name, "load": True})

    @router.post(f"/models/{MODEL_NAME}/unload", response_model=UnloadResponse, responses=v2_errors(400, 401, 404))
    async def unload(request: Request, model_name: str) -> Response:
        """Success once the model is unloaded, of several; the only model lives as long as the server."""
        model = await service.unload(model_name, await _parameters(request))
        return json_response({"name": model.name, "unload": True})

    async def _parameters(request: Request) -> dict[str, object]:
        parameters = (await _optional_object(request)).get("parameters") or {}
        if not isinstance(parameters, dict):
            raise InvalidRequestError("parameters must be a JSON object", "parameters")
        return parameters

    async def _optional_object(request: Request) -> dict[str, object]:
        return await decode_body(
            request, context.config.max_body_bytes, context.decoding, lambda body: parse_object(body) if body else {}
        )

    return router
