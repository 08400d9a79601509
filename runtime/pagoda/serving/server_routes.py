"""Liveness, `/health`, metrics and version: the routes that no inference protocol defines."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

import pagoda
from pagoda.serving.context import ServingContext
from pagoda.serving.http.responses import json_response


class HealthResponse(BaseModel):
    """What the server is doing. `since`: seconds since the epoch; `running`, `waiting`: sequences in the engine.

    `started`: whether the server was ready at some time. `step`: steps the engine has done; `seconds_since_progress`: age of
    its last heartbeat; null while there is no engine.
    """

    state: str
    started: bool
    stage: str
    detail: str
    since: float
    cause: str | None
    running: int
    waiting: int
    kv_cache_usage: float
    step: int | None
    seconds_since_progress: float | None


class AliveResponse(BaseModel):
    """Liveness as KServe's V1 clients read it."""

    status: str


class VersionResponse(BaseModel):
    """The version of Pagoda."""

    version: str


def server_router(context: ServingContext) -> APIRouter:
    """The routes that ask nothing of the model."""
    router = APIRouter(tags=["server"])
    health = context.health

    @router.get("/", response_model=AliveResponse, responses={503: {"model": AliveResponse}})
    async def alive() -> Response:
        """Liveness as KServe's V1 protocol has it."""
        status = "alive" if health.is_live else "dead"
        return json_response({"status": status}, 200 if health.is_live else 503)

    @router.get("/health", response_model=HealthResponse, responses={503: {"model": HealthResponse}})
    async def health_report() -> Response:
        """State, start-up stage and load of the server; 200 while it accepts requests."""
        return json_response(health.snapshot(), 200 if health.is_ready else 503)

    @router.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics(request: Request) -> Response:
        """Prometheus metrics."""
        body, content_type = context.metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    @router.get("/version", response_model=VersionResponse)
    async def version() -> Response:
        """The version of Pagoda."""
        return json_response({"version": pagoda.__version__})

    return router
