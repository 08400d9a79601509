"""The REST application: every route there is, in front of nothing else."""

from __future__ import annotations

import time

from fastapi import FastAPI
from kserve.protocol.rest.v2_datamodels import InferenceRequest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import pagoda
from pagoda.serving.context import ServingContext
from pagoda.serving.http import documentation
from pagoda.serving.http.middleware import Gate
from pagoda.serving.kserve.model import EngineDataPlane
from pagoda.serving.openai.routes import PREFIXES, openai_router, tokenizer_router
from pagoda.serving.openai.types import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from pagoda.serving.server_routes import server_router
from pagoda.serving.v2.generate_routes import generate_router
from pagoda.serving.v2.routes import repository_router, v2_router
from pagoda.serving.v2.schemas import GenerateRequest

BODIES = (
    InferenceRequest,
    GenerateRequest,
    CompletionRequest,
    ChatCompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
)


def install(app: FastAPI, context: ServingContext, plane: EngineDataPlane) -> None:
    """Put the gate and all routes on `app`, which must have none of KServe's: theirs answer 422, 500 and 501 to clients'
    mistakes, and say ready whatever the engine does.
    """
    app.title = "Pagoda"
    app.description = "LLM serving over the Open Inference Protocol (V2), the generate extension and OpenAI's routes."
    app.version = pagoda.__version__
    app.router.redirect_slashes = False
    app.add_middleware(Gate, keys=context.keys, metrics=context.metrics)
    app.add_exception_handler(HTTPException, _pass_on)
    app.include_router(server_router(context))
    app.include_router(v2_router(context, plane))
    app.include_router(generate_router(context, plane))
    app.include_router(repository_router(context, plane))
    started = int(time.time())
    for prefix in PREFIXES:
        app.include_router(openai_router(context, prefix, started))
    app.include_router(tokenizer_router(context))
    documentation.install(app, BODIES)


async def _pass_on(request: Request, error: Exception) -> Response:
    """The gate answers the router's own errors, too."""
    raise error
