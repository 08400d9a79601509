"""The REST application: every route there is, behind the one middleware."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import pagoda
from pagoda.serving.anthropic.errors import anthropic_error, is_anthropic_path
from pagoda.serving.anthropic.routes import anthropic_router
from pagoda.serving.anthropic.types import CountTokensRequest, MessagesRequest
from pagoda.serving.auth.routes import RouteAccess
from pagoda.serving.context import ServingContext
from pagoda.serving.http import documentation
from pagoda.serving.http.documentation_page import documentation_router
from pagoda.serving.http.middleware import RequestMiddleware
from pagoda.serving.ollama.routes import ollama_router
from pagoda.serving.ollama.types import OllamaChatRequest, OllamaGenerateRequest, OllamaShowRequest
from pagoda.serving.openai.adapter_routes import BODIES as ADAPTER_BODIES
from pagoda.serving.openai.adapter_routes import adapter_router
from pagoda.serving.openai.decisions.routes import decisions_router
from pagoda.serving.openai.decisions.types import DecisionRequest
from pagoda.serving.openai.errors import is_openai_path, openai_error
from pagoda.serving.openai.responses.routes import responses_router
from pagoda.serving.openai.responses.store import ResponseStore
from pagoda.serving.openai.responses.types import ResponsesRequest
from pagoda.serving.openai.routes import PREFIXES, invocations_router, openai_router, tokenizer_router
from pagoda.serving.openai.types import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from pagoda.serving.platform_routes import platform_router
from pagoda.serving.pooling.routes import pooling_router
from pagoda.serving.pooling.types import ClassifyRequest, EmbeddingRequest, PoolingBody, RerankRequest, ScoreRequest
from pagoda.serving.server_routes import server_router
from pagoda.serving.settings import Settings
from pagoda.serving.settings_routes import SettingsChange, settings_router
from pagoda.serving.sleep_routes import sleep_router
from pagoda.serving.status import ErrorReport
from pagoda.serving.tgi.errors import is_tgi_path, tgi_error
from pagoda.serving.tgi.routes import tgi_router
from pagoda.serving.tgi.types import TgiRequest
from pagoda.serving.ui.routes import ui_router
from pagoda.serving.v2.errors import v2_error
from pagoda.serving.v2.generate_routes import generate_router
from pagoda.serving.v2.routes import repository_router, v2_router
from pagoda.serving.v2.schemas import GenerateRequest, InferenceRequest
from pagoda.serving.v2.service import V2Service

REQUEST_BODIES = (
    SettingsChange,
    InferenceRequest,
    GenerateRequest,
    CompletionRequest,
    ChatCompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
    ResponsesRequest,
    MessagesRequest,
    CountTokensRequest,
    OllamaGenerateRequest,
    OllamaChatRequest,
    OllamaShowRequest,
    TgiRequest,
    EmbeddingRequest,
    PoolingBody,
    ClassifyRequest,
    ScoreRequest,
    RerankRequest,
    DecisionRequest,
    *ADAPTER_BODIES,
)

EXPOSED_HEADERS = ("x-request-id", "traceresponse", "retry-after")


def create_app(context: ServingContext, service: V2Service, settings: Settings) -> FastAPI:
    """The application with all routes."""
    config = context.config
    app = FastAPI(
        title="Pagoda",
        description="LLM serving over the Open Inference Protocol (V2), the generate extension and OpenAI's routes.",
        version=pagoda.__version__,
        docs_url=None,
        openapi_url=None if config.disable_fastapi_docs else "/openapi.json",
        redoc_url=None,
        redirect_slashes=False,
    )
    started = int(time.time())
    responses = ResponseStore(context.config.response_store_bytes)
    routers = [
        server_router(context),
        v2_router(context, service),
        generate_router(context, service),
        repository_router(context, service),
        *(openai_router(context, prefix, started) for prefix in PREFIXES),
        *(responses_router(context, prefix, responses) for prefix in PREFIXES),
        decisions_router(context),
        anthropic_router(context),
        pooling_router(context),
        adapter_router(context),
        tokenizer_router(context),
        invocations_router(context),
        platform_router(context),
        sleep_router(context),
        settings_router(context, settings),
        ollama_router(context),
        tgi_router(context),
        *([] if config.disable_fastapi_docs else [documentation_router()]),
        *([ui_router(context)] if config.ui else []),
    ]
    access = RouteAccess([*app.routes, *(route for router in routers for route in router.routes)])
    for router in routers:
        app.include_router(router)
    app.add_middleware(
        RequestMiddleware,
        keys=context.keys,
        metrics=context.metrics,
        access=access,
        error_body=error_body,
        rate_limits=context.rate_limits,
        objectives=config.inference_objectives or {},
        turns=context.turns,
        tracing=context.tracing,
    )
    if config.allowed_origins:
        # Outermost: a browser sends no key with the request that asks whether it may.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_exception_handler(HTTPException, _raise_on)
    documentation.install(app, REQUEST_BODIES)
    return app


def error_body(path: str, report: ErrorReport) -> dict[str, Any]:
    """The body of an error on `path`, in the shape that the clients of its protocol read."""
    if is_anthropic_path(path):
        return anthropic_error(report)
    if is_tgi_path(path):
        return tgi_error(report)
    return openai_error(report) if is_openai_path(path) else v2_error(report)


async def _raise_on(request: Request, error: Exception) -> Response:
    """The middleware responds to the router's own errors, too."""
    raise error
