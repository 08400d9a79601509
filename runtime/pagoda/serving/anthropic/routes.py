"""/v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagoda.serving.anthropic.call import MessagesCall
from pagoda.serving.anthropic.errors import anthropic_error_event
from pagoda.serving.anthropic.requests import chat_request
from pagoda.serving.anthropic.types import CountTokensRequest, MessagesRequest
from pagoda.serving.context import ServingContext
from pagoda.serving.http.disconnect import until_disconnect
from pagoda.serving.http.documentation import object_errors, request_body
from pagoda.serving.http.event_stream import open_event_stream
from pagoda.serving.http.responses import json_response
from pagoda.serving.openai.chat import ChatCall
from pagoda.serving.openai.routes import EVENTS, read_request, requested_seconds


def anthropic_router(context: ServingContext) -> APIRouter:
    """Anthropic's Messages; query parameters and beta headers change nothing."""
    router = APIRouter(prefix="/v1/messages", tags=["anthropic"])

    errors = object_errors(400, 401, 403, 404, 413, 429, 500, 503, 504)

    @router.post("", responses={200: {"content": EVENTS}, **errors}, openapi_extra=request_body(MessagesRequest))
    async def messages(request: Request) -> Response:
        """Continue a conversation; `stream: true` streams Anthropic's events."""
        seconds = requested_seconds(request)
        body, call = await read_request(
            context, request, MessagesRequest, lambda model, body: (body, MessagesCall(model, body, seconds))
        )
        if body.stream:
            return await open_event_stream(request, call.events(), anthropic_error_event, context.metrics)
        return json_response(await until_disconnect(request, call.whole()))

    @router.post("/count_tokens", responses=errors, openapi_extra=request_body(CountTokensRequest))
    async def count_tokens(request: Request) -> Response:
        """Tokens of the prompt that a conversation becomes."""
        chat = await read_request(
            context, request, CountTokensRequest, lambda model, body: ChatCall(model, chat_request(body), None)
        )
        (job,) = await until_disconnect(request, chat.jobs())
        return json_response({"input_tokens": len(job.prompt)})

    return router
