"""/v1/embeddings, /score, /rerank, /classify and /pooling, each under the paths that clients know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagoda.serving.context import ServingContext
from pagoda.serving.http.disconnect import until_disconnect
from pagoda.serving.http.documentation import request_body
from pagoda.serving.models import ServedModel
from pagoda.serving.openai.errors import openai_errors
from pagoda.serving.openai.routes import GENERATION_ERRORS, read_request, requested_seconds
from pagoda.serving.openai.types import RequestModel
from pagoda.serving.pooling.calls import ClassifyCall, EmbeddingCall, RerankCall, score_call
from pagoda.serving.pooling.types import (
    ClassifyRequest,
    ClassifyResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    PoolingBody,
    PoolingResponse,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
)

Body = TypeVar("Body", bound=RequestModel)


class _Call(Protocol):
    async def whole(self) -> bytes:
        """The answer's JSON."""


def pooling_router(context: ServingContext) -> APIRouter:
    """All routes of a model that pools; one that generates answers them with 400."""
    router = APIRouter(tags=["pooling"])

    def add(
        paths: tuple[str, ...],
        kind: type[Body],
        answer: type[Any],
        make: Callable[[ServedModel, Body, float | None], _Call],
        what: str,
    ) -> None:
        async def endpoint(request: Request) -> Response:
            seconds = requested_seconds(request)
            call = await read_request(context, request, kind, lambda model, body: make(model, body, seconds))
            return Response(await until_disconnect(request, call.whole()), media_type="application/json")

        for path in paths:
            router.add_api_route(
                path,
                endpoint,
                methods=["POST"],
                response_model=answer,
                responses=openai_errors(*GENERATION_ERRORS),
                openapi_extra=request_body(kind),
                name=path.rpartition("/")[2],
                description=what,
                include_in_schema=not path.startswith("/openai"),
            )

    add(
        ("/v1/embeddings", "/openai/v1/embeddings"),
        EmbeddingRequest,
        EmbeddingResponse,
        EmbeddingCall,
        "Vectors of texts, in OpenAI's shape.",
    )
    add(("/pooling", "/v1/pooling"), PoolingBody, PoolingResponse, EmbeddingCall, "What a task makes of texts.")
    add(("/classify", "/v1/classify"), ClassifyRequest, ClassifyResponse, ClassifyCall, "Labels of texts.")
    add(("/score", "/v1/score"), ScoreRequest, ScoreResponse, score_call, "How well pairs of texts belong together.")
    add(
        ("/rerank", "/v1/rerank"),
        RerankRequest,
        RerankResponse,
        RerankCall,
        "Documents sorted by a query, in Jina's shape.",
    )
    add(
        ("/v2/rerank",),
        RerankRequest,
        RerankResponse,
        lambda model, body, seconds: RerankCall(model, body, seconds, is_cohere=True),
        "The same in Cohere's.",
    )
    return router
