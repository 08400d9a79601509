"""/api/generate, /api/chat and what Ollama's clients ask before: /api/{tags,show,ps,version}."""

from __future__ import annotations

from typing import TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from pagoda.errors import InvalidRequestError
from pagoda.serving.context import ServingContext
from pagoda.serving.http.disconnect import until_disconnect
from pagoda.serving.http.documentation import JSON_OBJECT, request_body
from pagoda.serving.http.event_stream import JSON_LINES, json_line, open_event_stream
from pagoda.serving.http.responses import json_response
from pagoda.serving.models import ServedModel
from pagoda.serving.ollama.call import OllamaAnswer, now
from pagoda.serving.ollama.model_details import ModelDetails
from pagoda.serving.ollama.requests import is_empty
from pagoda.serving.ollama.types import OllamaChatRequest, OllamaGenerateRequest, OllamaShowRequest
from pagoda.serving.openai.routes import read_request, requested_seconds
from pagoda.serving.status import ErrorReport
from pagoda.serving.v2.errors import v2_error, v2_errors

OLLAMA_VERSION = "0.12.11"
"""Whose API this is: clients ask for it and refuse an older one."""

LINES = {JSON_LINES.media_type: {"schema": {"type": "string"}}}
Asked = TypeVar("Asked", OllamaChatRequest, OllamaGenerateRequest)


class OllamaVersion(BaseModel):
    """The version of Ollama's API."""

    version: str


def ollama_router(context: ServingContext) -> APIRouter:
    """Ollama's routes; those that pull, push, copy, make and delete models are not there."""
    router = APIRouter(prefix="/api", tags=["ollama"])
    details = {served.name: ModelDetails(served) for served in context.models}
    responses = {200: {"content": {**JSON_OBJECT, **LINES}}, **v2_errors(400, 401, 404, 413, 429, 500, 503, 504)}

    async def answer(request: Request, kind: type[Asked]) -> Response:
        seconds = requested_seconds(request)
        body, made = await read_request(
            context,
            request,
            kind,
            lambda model, body: (body, _loaded(model, body) if is_empty(body) else OllamaAnswer(model, body, seconds)),
        )
        if isinstance(made, dict):
            return json_response(made)
        if body.stream is False:
            return json_response(await until_disconnect(request, made.whole()))
        return await open_event_stream(request, made.events(), _error_line, context.metrics, JSON_LINES)

    @router.post("/generate", responses=responses, openapi_extra=request_body(OllamaGenerateRequest))
    async def generate(request: Request) -> Response:
        """Answer one prompt; a line for each piece unless `stream` is false."""
        return await answer(request, OllamaGenerateRequest)

    @router.post("/chat", responses=responses, openapi_extra=request_body(OllamaChatRequest))
    async def chat(request: Request) -> Response:
        """Continue a conversation; a line for each piece unless `stream` is false."""
        return await answer(request, OllamaChatRequest)

    @router.get("/tags", responses={200: {"content": JSON_OBJECT}, **v2_errors(401, 503)})
    async def tags() -> Response:
        """The served model under each of its names."""
        context.repository.check_open()
        cards = [
            details[served.name].card(name)
            for served in context.models
            if served.has_files
            for name, _ in served.listed
        ]
        return json_response({"models": cards})

    @router.get("/ps", responses={200: {"content": JSON_OBJECT}, **v2_errors(401, 503)})
    async def ps() -> Response:
        """The models that are loaded."""
        context.repository.check_open()
        loaded = [served for served in context.models if served.health.is_ready]
        return json_response({"models": [details[served.name].running(served.name) for served in loaded]})

    @router.post(
        "/show",
        responses={200: {"content": JSON_OBJECT}, **v2_errors(400, 401, 404, 413, 503)},
        openapi_extra=request_body(OllamaShowRequest),
    )
    async def show(request: Request) -> Response:
        """What the model is, and what it can do."""
        name = await read_request(context, request, OllamaShowRequest, lambda model, body: body.model or body.name)
        if not name:
            raise InvalidRequestError("model is needed", "model")
        return json_response(details[(found := context.models.find(name)).parent or found.name].shown())

    @router.get("/version", response_model=OllamaVersion)
    async def version() -> Response:
        """The version of Ollama whose API this is."""
        return json_response({"version": OLLAMA_VERSION})

    return router


def _loaded(model: ServedModel, body: OllamaChatRequest | OllamaGenerateRequest) -> dict[str, object]:
    """The answer to a request that only asks that the model be loaded."""
    text = (
        {"message": {"role": "assistant", "content": ""}} if isinstance(body, OllamaChatRequest) else {"response": ""}
    )
    return {
        "model": body.model or model.name,
        "created_at": now(),
        **text,
        "done": True,
        "done_reason": "load",
    }


def _error_line(report: ErrorReport) -> bytes:
    return json_line(v2_error(report))
