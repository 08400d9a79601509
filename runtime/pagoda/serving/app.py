"""The REST application: every route there is, behind the one middleware."""

from __future__ import annotations

import re
import time
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import pagoda
from pagoda.serving.context import ServingContext
from pagoda.serving.http import documentation
from pagoda.serving.http.middleware import RequestMiddleware
from pagoda.serving.openai.errors import is_openai_path, openai_error
from pagoda.serving.openai.routes import PREFIXES, openai_router, tokenizer_router
from pagoda.serving.openai.types import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from pagoda.serving.server_routes import server_router
from pagoda.serving.status import ErrorReport
from pagoda.serving.v2.errors import v2_error
from pagoda.serving.v2.generate_routes import generate_router
from pagoda.serving.v2.routes import repository_router, v2_router
from pagoda.serving.v2.schemas import GenerateRequest, InferenceRequest
from pagoda.serving.v2.service import V2Service

REQUEST_BODIES = (
    InferenceRequest,
    GenerateRequest,
    CompletionRequest,
    ChatCompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
)
PUBLIC_PATHS = frozenset({"/", "/health", "/metrics", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"})
PUBLIC_PATTERN = re.compile(r"/v2/models/[^/]+(/versions/[^/]+)?/ready")
"""Probes and scrapers send no API key; these routes show nothing of what clients send."""


def create_app(context: ServingContext, service: V2Service) -> FastAPI:
    """The application with all routes."""
    app = FastAPI(
        title="Pagoda",
        description="LLM serving over the Open Inference Protocol (V2), the generate extension and OpenAI's routes.",
        version=pagoda.__version__,
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(
        RequestMiddleware, keys=context.keys, metrics=context.metrics, is_public=is_public, error_body=error_body
    )
    app.add_exception_handler(HTTPException, _raise_on)
    app.include_router(server_router(context))
    app.include_router(v2_router(context, service))
    app.include_router(generate_router(context, service))
    app.include_router(repository_router(context, service))
    started = int(time.time())
    for prefix in PREFIXES:
        app.include_router(openai_router(context, prefix, started))
    app.include_router(tokenizer_router(context))
    documentation.install(app, REQUEST_BODIES)
    return app


def is_public(path: str) -> bool:
    """Whether `path` needs no API key."""
    return path in PUBLIC_PATHS or PUBLIC_PATTERN.fullmatch(path) is not None


def error_body(path: str, report: ErrorReport) -> dict[str, Any]:
    """The body of an error on `path`, in the shape that the clients of its protocol read."""
    return openai_error(report) if is_openai_path(path) else v2_error(report)


async def _raise_on(request: Request, error: Exception) -> Response:
    """The middleware responds to the router's own errors, too."""
    raise error
