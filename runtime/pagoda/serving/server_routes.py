"""Liveness, `/health`, metrics and version: the routes that no inference protocol defines."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

import pagoda
from pagoda.serving.auth.api_keys import caller_var
from pagoda.serving.auth.scopes import Access
from pagoda.serving.context import ServingContext
from pagoda.serving.http.responses import json_response


class HealthSummary(BaseModel):
    """What everybody may know of the server: its state, whether it was ready at some time, its start-up stage."""

    state: str
    started: bool
    stage: str


class HealthResponse(HealthSummary):
    """What the server is doing. `since`: seconds since the epoch; `running`, `waiting`: sequences in the engine.

    `step`: steps the engine has done; `seconds_since_progress`: age of
    its last heartbeat; null while there is no engine.
    """

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

    @router.get(
        "/health",
        response_model=HealthResponse | HealthSummary,
        responses={503: {"model": HealthResponse | HealthSummary}},
    )
    async def health_report() -> Response:
        """State of the server; 200 while it accepts requests. Load, causes and ranks are for keys with the scope `read`."""
        may_read = Access.READ.admits(caller_var.get().scopes)
        return json_response(health.snapshot() if may_read else health.summary(), 200 if health.is_ready else 503)

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
