"""/v1/responses, and responses that are kept."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagoda.serving.auth.api_keys import caller_var
from pagoda.serving.context import ServingContext
from pagoda.serving.http.disconnect import until_disconnect
from pagoda.serving.http.documentation import JSON_OBJECT, request_body
from pagoda.serving.http.event_stream import open_event_stream
from pagoda.serving.http.responses import json_response
from pagoda.serving.openai.errors import openai_errors
from pagoda.serving.openai.responses.call import ResponsesCall
from pagoda.serving.openai.responses.store import ResponseStore
from pagoda.serving.openai.responses.types import ResponsesRequest
from pagoda.serving.openai.routes import EVENTS, GENERATION_ERRORS, PREFIXES, read_request, requested_seconds


def responses_router(context: ServingContext, prefix: str, store: ResponseStore) -> APIRouter:
    """OpenAI's Responses under one prefix."""
    router = APIRouter(prefix=prefix, tags=["openai"], include_in_schema=prefix == PREFIXES[0])
    errors = openai_errors(*GENERATION_ERRORS)

    @router.post(
        "/responses",
        responses={200: {"content": {**JSON_OBJECT, **EVENTS}}, **errors},
        openapi_extra=request_body(ResponsesRequest),
        response_class=Response,
    )
    async def responses(request: Request) -> Response:
        """Continue a conversation; `stream: true` streams OpenAI's events."""
        seconds, kept = requested_seconds(request), store.of(caller_var.get().tenant)
        body, call = await read_request(
            context,
            request,
            ResponsesRequest,
            lambda model, body: (body, ResponsesCall(model, body, seconds, kept)),
        )
        if body.stream:
            return await open_event_stream(request, call.events(), call.error_event, context.metrics)
        return json_response(await until_disconnect(request, call.whole()))

    answers = {200: {"content": JSON_OBJECT}, **openai_errors(401, 404)}

    @router.get("/responses/{response_id}", responses=answers, response_class=Response)
    async def stored(response_id: str) -> Response:
        """A response that is kept."""
        return json_response(store.of(caller_var.get().tenant).get(response_id)[0])

    @router.delete("/responses/{response_id}", responses=answers, response_class=Response)
    async def forget(response_id: str) -> Response:
        """Forget a response."""
        store.of(caller_var.get().tenant).delete(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    return router
