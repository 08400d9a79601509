"""Health, metrics and version."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

import pagoda
from pagoda.serving.context import ServingContext
from pagoda.serving.http.responses import json_response
from pagoda.serving.v2.schemas import AliveResponse, HealthResponse, LiveResponse, ReadyResponse, VersionResponse


def server_router(context: ServingContext) -> APIRouter:
    """The routes that ask nothing of the model."""
    router = APIRouter(tags=["server"])
    health = context.health

    @router.get("/", response_model=AliveResponse, responses={503: {"model": AliveResponse}})
    async def alive() -> Response:
        """Liveness in the words of KServe's V1 protocol."""
        status = "alive" if health.is_live else "dead"
        return json_response({"status": status}, 200 if health.is_live else 503)

    @router.get("/health", response_model=HealthResponse, responses={503: {"model": HealthResponse}})
    async def health_report() -> Response:
        """State, start-up stage and load of the server; 200 when it takes requests."""
        return json_response(health.snapshot(), 200 if health.is_ready else 503)

    @router.get("/v2/health/live", response_model=LiveResponse, responses={503: {"model": LiveResponse}})
    async def live() -> Response:
        """200 unless the engine is dead: a server that loads or drains is live."""
        if health.is_live:
            return json_response({"live": True})
        return json_response({"live": False, "error": f"dead: {health.cause}"}, 503)

    @router.get("/v2/health/ready", response_model=ReadyResponse, responses={503: {"model": ReadyResponse}})
    async def ready() -> Response:
        """200 while a request sent now would be taken."""
        if health.is_ready:
            return json_response({"ready": True})
        words = ", ".join(dict.fromkeys([str(health.state), health.phase]))
        return json_response({"ready": False, "error": f"not ready: {words}"}, 503)

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
