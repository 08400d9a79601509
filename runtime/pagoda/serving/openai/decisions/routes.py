"""/v1/decisions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagoda.serving.context import ServingContext
from pagoda.serving.http.disconnect import until_disconnect
from pagoda.serving.http.documentation import request_body
from pagoda.serving.openai.decisions.call import DecisionCall
from pagoda.serving.openai.decisions.types import DecisionRequest, DecisionResponse
from pagoda.serving.openai.errors import openai_errors
from pagoda.serving.openai.routes import GENERATION_ERRORS, PREFIXES, read_request, requested_seconds


def decisions_router(context: ServingContext) -> APIRouter:
    """The route under both prefixes."""
    router = APIRouter(tags=["openai"])

    async def decisions(request: Request) -> Response:
        """Answer questions about an input by probabilities; nothing is generated."""
        seconds = requested_seconds(request)
        call = await read_request(
            context, request, DecisionRequest, lambda model, body: DecisionCall(model, body, seconds)
        )
        return Response(await until_disconnect(request, call.whole()), media_type="application/json")

    for prefix in PREFIXES:
        router.add_api_route(
            f"{prefix}/decisions",
            decisions,
            methods=["POST"],
            response_model=DecisionResponse,
            responses=openai_errors(*GENERATION_ERRORS),
            openapi_extra=request_body(DecisionRequest),
            include_in_schema=prefix == PREFIXES[0],
        )
    return router
