"""The Open Inference Protocol (V2) over REST, and Triton's repository extension."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from kserve.protocol.rest.v2_datamodels import (
    InferenceRequest,
    InferenceResponse,
    ModelMetadataResponse,
    ModelReadyResponse,
    ServerMetadataResponse,
)
from starlette.responses import Response

from pagoda.errors import InvalidRequestError, NotSupportedError
from pagoda.serving.context import ServingContext
from pagoda.serving.http.bodies import parse_object, read_body
from pagoda.serving.http.disconnect import until_disconnect
from pagoda.serving.http.documentation import request_body, v2_errors
from pagoda.serving.http.responses import json_response
from pagoda.serving.kserve.model import EngineDataPlane
from pagoda.serving.v2.inference import MODEL_VERSION
from pagoda.serving.v2.json_codec import LENGTH_HEADER, decode_infer, encode_infer
from pagoda.serving.v2.schemas import LoadResponse, RepositoryEntry

MODEL = "/v2/models/{model_name}"
VERSION = MODEL + "/versions/{model_version}"


def v2_router(context: ServingContext, plane: EngineDataPlane) -> APIRouter:
    """Metadata, readiness and infer of the model, with and without a version in the path."""
    router = APIRouter(tags=["v2"])

    @router.get("/v2", response_model=ServerMetadataResponse)
    @router.get("/v2/", include_in_schema=False)
    async def server_metadata() -> Response:
        """Name, version and extensions of the server."""
        return json_response(plane.metadata())

    @router.get(MODEL, response_model=ModelMetadataResponse, responses=v2_errors(401, 404))
    @router.get(VERSION, response_model=ModelMetadataResponse, responses=v2_errors(401, 404))
    async def model_metadata(model_name: str, model_version: str | None = None) -> Response:
        """Inputs and outputs of the model."""
        plane.check_version(model_version)
        return json_response(await plane.model_metadata(model_name))

    @router.get(f"{MODEL}/ready", response_model=ModelReadyResponse, responses=v2_errors(404, 503))
    @router.get(f"{VERSION}/ready", response_model=ModelReadyResponse, responses=v2_errors(404, 503))
    async def model_ready(model_name: str, model_version: str | None = None) -> Response:
        """200 while a request to the model would be taken."""
        plane.check_version(model_version)
        await plane.get_model(model_name)
        return json_response({"name": model_name, "ready": True})

    errors = v2_errors(400, 401, 404, 413, 429, 500, 501, 503, 504)
    body = request_body(InferenceRequest)

    @router.post(f"{MODEL}/infer", response_model=InferenceResponse, responses=errors, openapi_extra=body)
    @router.post(f"{VERSION}/infer", response_model=InferenceResponse, responses=errors, openapi_extra=body)
    async def infer(request: Request, model_name: str, model_version: str | None = None) -> Response:
        """Generate for a batch of prompts; tensors as JSON or as binary data behind it."""
        plane.check_version(model_version)
        await plane.get_model(model_name)
        content = await read_body(request, context.config.max_body_bytes)
        infer_request = decode_infer(content, request.headers.get(LENGTH_HEADER), model_name)
        headers = dict(request.headers)
        response, _ = await until_disconnect(request, plane.infer(model_name, infer_request, headers))
        return encode_infer(infer_request, response)

    return router


def repository_router(context: ServingContext, plane: EngineDataPlane) -> APIRouter:
    """Triton's repository extension for the one model there is."""
    router = APIRouter(prefix="/v2/repository", tags=["repository"])

    @router.post("/index", response_model=list[RepositoryEntry], responses=v2_errors(400, 401))
    async def index(request: Request) -> Response:
        """The model and whether it is ready; `{"ready": true}` leaves out what is not."""
        content = await _optional_object(request)
        only_ready = content.get("ready", False)
        if not isinstance(only_ready, bool):
            raise InvalidRequestError("ready must be true or false", "ready")
        health = context.health
        entry = {
            "name": context.model_name,
            "version": MODEL_VERSION,
            "state": "READY" if health.is_ready else "UNAVAILABLE",
            "reason": "" if health.is_ready else health.phase,
        }
        return json_response([entry] if health.is_ready or not only_ready else [])

    @router.post("/models/{model_name}/load", response_model=LoadResponse, responses=v2_errors(400, 401, 404, 503))
    async def load(request: Request, model_name: str) -> Response:
        """Success once the model is loaded; there is nothing else to load."""
        await _optional_object(request)
        await plane.get_model(model_name)
        return json_response({"name": model_name, "load": True})

    @router.post("/models/{model_name}/unload", responses=v2_errors(400, 401, 404, 501))
    async def unload(request: Request, model_name: str) -> Response:
        """Not supported: the model lives as long as the server."""
        await _optional_object(request)
        plane.get_model_from_registry(model_name)
        raise NotSupportedError("the model cannot be unloaded while the server runs; stop the server instead")

    async def _optional_object(request: Request) -> dict[str, Any]:
        content = await read_body(request, context.config.max_body_bytes)
        return parse_object(content) if content else {}

    return router
