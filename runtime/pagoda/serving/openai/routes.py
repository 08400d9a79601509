"""OpenAI's routes under /v1 and /openai/v1, and vLLM's tokenize and detokenize."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagoda.errors import InvalidRequestError, NotSupportedError
from pagoda.serving.context import ServingContext
from pagoda.serving.http.bodies import decode_body, parse_object
from pagoda.serving.http.disconnect import until_disconnect
from pagoda.serving.http.documentation import request_body
from pagoda.serving.http.event_stream import open_event_stream
from pagoda.serving.http.responses import json_response
from pagoda.serving.model_paths import MODEL_NAME
from pagoda.serving.openai.call import Call
from pagoda.serving.openai.chat import ChatCall, encode_chat
from pagoda.serving.openai.completions import CompletionCall
from pagoda.serving.openai.errors import openai_error, openai_errors
from pagoda.serving.openai.requests import parse_request, template_messages
from pagoda.serving.openai.tools import template_tools
from pagoda.serving.openai.types import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    RequestModel,
    SamplingFields,
    TokenizeRequest,
    TokenizeResponse,
)
from pagoda.serving.parameters import TIMEOUT_HEADER, parse_timeout_header

PREFIXES = ("/v1", "/openai/v1")
GENERATION_ERRORS = (400, 401, 404, 413, 429, 500, 503, 504)
EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}

Body = TypeVar("Body", bound=RequestModel)
Made = TypeVar("Made")


def openai_router(context: ServingContext, prefix: str, started: int) -> APIRouter:
    """Models, completions, chat completions and embeddings under one prefix. `started`: when, in seconds since the epoch."""
    router = APIRouter(prefix=prefix, tags=["openai"], include_in_schema=prefix == PREFIXES[0])
    errors = openai_errors(*GENERATION_ERRORS)

    @router.get("/models", response_model=ModelList, responses=openai_errors(401, 503))
    @router.get("/models/", include_in_schema=False)
    async def models() -> Response:
        """The served model under each of its names, once it is ready."""
        context.health.check_ready()
        names = [name for served in context.models for name in served.names]
        return json_response({"object": "list", "data": [_card(context, name, started) for name in names]})

    @router.get(f"/models/{MODEL_NAME}", response_model=ModelCard, responses=openai_errors(401, 404, 503))
    async def model(model_name: str) -> Response:
        """The served model by one of its names, which may have slashes."""
        context.models.find(model_name).health.check_ready()
        return json_response(_card(context, model_name, started))

    @router.post(
        "/completions",
        response_model=CompletionResponse,
        responses={200: {"content": EVENTS}, **errors},
        openapi_extra=request_body(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        """Complete prompts; `stream: true` streams events that end with `[DONE]`."""
        seconds = requested_seconds(request)
        body, call = await read_request(
            context, request, CompletionRequest, lambda body: (body, CompletionCall(context, body, seconds))
        )
        return await _response(context, request, body, call)

    @router.post(
        "/chat/completions",
        response_model=ChatCompletionResponse,
        responses={200: {"content": EVENTS}, **errors},
        openapi_extra=request_body(ChatCompletionRequest),
    )
    async def chat_completions(request: Request) -> Response:
        """Continue a conversation; `stream: true` streams events that end with `[DONE]`."""
        seconds = requested_seconds(request)
        body, call = await read_request(
            context, request, ChatCompletionRequest, lambda body: (body, ChatCall(context, body, seconds))
        )
        return await _response(context, request, body, call)

    @router.post("/embeddings", responses=openai_errors(400, 401), response_class=Response)
    async def embeddings() -> Response:
        """Not supported."""
        raise NotSupportedError("embeddings are not supported by this server; it serves a generating model")

    return router


def invocations_router(context: ServingContext) -> APIRouter:
    """SageMaker's one route for requests: a conversation where the body has messages, else prompts."""
    router = APIRouter(tags=["openai"])

    @router.post(
        "/invocations",
        response_model=ChatCompletionResponse | CompletionResponse,
        responses={200: {"content": EVENTS}, **openai_errors(*GENERATION_ERRORS)},
        openapi_extra=request_body(ChatCompletionRequest),
    )
    async def invocations(request: Request) -> Response:
        """What `/v1/chat/completions` or `/v1/completions` answer."""
        seconds = requested_seconds(request)

        def parsed(content: Mapping[str, Any]) -> tuple[SamplingFields, Call]:
            if "messages" in content:
                conversation = _for_model(context, parse_request(ChatCompletionRequest, content))
                return conversation, ChatCall(context, conversation, seconds)
            completion = _for_model(context, parse_request(CompletionRequest, content))
            return completion, CompletionCall(context, completion, seconds)

        body, call = await _read_object(context, request, parsed)
        return await _response(context, request, body, call)

    return router


def tokenizer_router(context: ServingContext) -> APIRouter:
    """Text to token ids and back, in vLLM's shapes."""
    router = APIRouter(tags=["tokenizer"])
    errors = openai_errors(400, 401, 404, 413, 500, 503, 504)

    @router.post(
        "/tokenize",
        response_model=TokenizeResponse,
        responses=errors,
        openapi_extra=request_body(TokenizeRequest),
    )
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt or of a conversation."""
        body = await read_request(context, request, TokenizeRequest, _checked)
        return json_response(await until_disconnect(request, _tokenize(context, body)))

    @router.post(
        "/detokenize",
        response_model=DetokenizeResponse,
        responses=errors,
        openapi_extra=request_body(DetokenizeRequest),
    )
    async def detokenize(request: Request) -> Response:
        """Text of token ids."""
        tokens = await read_request(context, request, DetokenizeRequest, lambda body: body.tokens)
        work = context.generator.pool.decode_request(tokens, _num_token_ids(context))
        return json_response({"prompt": await until_disconnect(request, work)})

    return router


async def read_request(
    context: ServingContext, request: Request, kind: type[Body], make: Callable[[Body], Made]
) -> Made:
    """What `make` makes of the checked body of a request for the served model, once that is ready.

    A large body is parsed and checked, and `make` called, beside the event loop.
    """
    return await _read_object(context, request, lambda content: make(_for_model(context, parse_request(kind, content))))


async def _read_object(context: ServingContext, request: Request, make: Callable[[Mapping[str, Any]], Made]) -> Made:
    context.health.check_ready()
    limits = context.json_limits
    return await decode_body(
        request,
        context.config.max_body_bytes,
        context.decoding,
        lambda content: make(parse_object(content, limits)),
    )


def _for_model(context: ServingContext, body: Body) -> Body:
    if body.model is not None:
        context.models.find(body.model)
    return body


async def _response(context: ServingContext, request: Request, body: SamplingFields, call: Call) -> Response:
    if body.stream:
        return await open_event_stream(request, call.events(), openai_error, context.metrics)
    return json_response(await until_disconnect(request, call.whole()))


def requested_seconds(request: Request) -> float | None:
    """The time that the client's header allows."""
    return parse_timeout_header(request.headers.get(TIMEOUT_HEADER))


def _card(context: ServingContext, name: str, created: int) -> dict[str, Any]:
    ready = context.client.ready
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "pagoda",
        "root": context.config.model or context.model_name,
        "parent": None,
        "max_model_len": ready.max_model_len if ready is not None else None,
    }


def _num_token_ids(context: ServingContext) -> int:
    """Ids of the model or of its tokenizer: either may have some that the other has not."""
    ready = context.client.ready
    return max(context.generator.pool.tokenizer.vocab_size, ready.vocab_size if ready is not None else 0)


def _checked(body: TokenizeRequest) -> TokenizeRequest:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give exactly one of prompt and messages", "prompt")
    return body


async def _tokenize(context: ServingContext, body: TokenizeRequest) -> dict[str, Any]:
    pool = context.generator.pool
    if body.prompt is not None:
        token_ids = await pool.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        messages = template_messages(body.messages or [])
        token_ids = await encode_chat(context, body, messages, tools=template_tools(body.tools, None))
    ready = context.client.ready
    return {
        "count": len(token_ids),
        "max_model_len": ready.max_model_len if ready is not None else None,
        "tokens": token_ids,
        "token_strs": await pool.decode_each(token_ids) if body.return_token_strs else None,
    }
