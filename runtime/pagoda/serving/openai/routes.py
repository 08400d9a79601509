"""OpenAI's routes under /v1 and /openai/v1, and vLLM's tokenize and detokenize."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagoda.errors import InvalidRequestError
from pagoda.serving.context import ServingContext
from pagoda.serving.http.bodies import decode_body, parse_object
from pagoda.serving.http.disconnect import until_disconnect
from pagoda.serving.http.documentation import request_body
from pagoda.serving.http.event_stream import open_event_stream
from pagoda.serving.http.responses import json_response
from pagoda.serving.model_paths import MODEL_NAME
from pagoda.serving.models import ServedModel
from pagoda.serving.openai.call import Call
from pagoda.serving.openai.chat import ChatCall, encode_chat
from pagoda.serving.openai.completions import CompletionCall
from pagoda.serving.openai.errors import openai_error, openai_errors
from pagoda.serving.openai.render import RenderedRequest, rendered
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
    """Models, completions and chat completions under one prefix. `started`: when, in seconds since the epoch."""
    router = APIRouter(prefix=prefix, tags=["openai"], include_in_schema=prefix == PREFIXES[0])
    errors = openai_errors(*GENERATION_ERRORS)

    @router.get("/models", response_model=ModelList, responses=openai_errors(401, 503))
    @router.get("/models/", include_in_schema=False)
    async def models() -> Response:
        """Each served model under each of its names, and its adapters, loaded or not; the only one, once it is ready."""
        context.repository.check_open()
        cards = [_card(model, name, started) for served in context.models for name, model in served.listed]
        return json_response({"object": "list", "data": cards})

    @router.get(f"/models/{MODEL_NAME}", response_model=ModelCard, responses=openai_errors(401, 404, 503))
    async def model(model_name: str) -> Response:
        """The served model by one of its names, which may have slashes."""
        served = context.models.find(model_name)
        context.repository.check_open()
        return json_response(_card(served, model_name, started))

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
            context, request, CompletionRequest, lambda model, body: (body, CompletionCall(model, body, seconds))
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
            context, request, ChatCompletionRequest, lambda model, body: (body, ChatCall(model, body, seconds))
        )
        return await _response(context, request, body, call)

    @router.post(
        "/completions/render",
        response_model=list[RenderedRequest],
        responses=errors,
        openapi_extra=request_body(CompletionRequest),
    )
    async def render_completions(request: Request) -> Response:
        """Token ids and sampling parameters of each prompt; nothing is generated."""
        model, body, call = await read_request(
            context, request, CompletionRequest, lambda model, body: (model, body, CompletionCall(model, body, None))
        )
        return json_response(await until_disconnect(request, rendered(model, body, call)))

    @router.post(
        "/chat/completions/render",
        response_model=RenderedRequest,
        responses=errors,
        openapi_extra=request_body(ChatCompletionRequest),
    )
    async def render_chat(request: Request) -> Response:
        """Token ids and sampling parameters of a conversation; nothing is generated."""
        model, body, call = await read_request(
            context, request, ChatCompletionRequest, lambda model, body: (model, body, ChatCall(model, body, None))
        )
        (only,) = await until_disconnect(request, rendered(model, body, call))
        return json_response(only)

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

        def parsed(content: Mapping[str, Any]) -> ChatCompletionRequest | CompletionRequest:
            if "messages" in content:
                return parse_request(ChatCompletionRequest, content)
            return parse_request(CompletionRequest, content)

        def made(model: ServedModel, body: ChatCompletionRequest | CompletionRequest) -> tuple[SamplingFields, Call]:
            if isinstance(body, ChatCompletionRequest):
                return body, ChatCall(model, body, seconds)
            return body, CompletionCall(model, body, seconds)

        body, call = await _read_object(context, request, parsed, made)
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
        model, body = await read_request(context, request, TokenizeRequest, _checked)
        return json_response(await until_disconnect(request, _tokenize(model, body)))

    @router.post(
        "/detokenize",
        response_model=DetokenizeResponse,
        responses=errors,
        openapi_extra=request_body(DetokenizeRequest),
    )
    async def detokenize(request: Request) -> Response:
        """Text of token ids."""
        model, tokens = await read_request(
            context, request, DetokenizeRequest, lambda model, body: (model, body.tokens)
        )
        work = model.text.pool.decode_request(tokens, _num_token_ids(model))
        return json_response({"prompt": await until_disconnect(request, work)})

    return router


async def read_request(
    context: ServingContext, request: Request, kind: type[Body], make: Callable[[ServedModel, Body], Made]
) -> Made:
    """What `make` makes of the model that a request asks for, once that is ready, and of the checked body.

    A large body is parsed and checked, and `make` called, beside the event loop.
    """
    return await _read_object(context, request, lambda content: parse_request(kind, content), make)


async def _read_object(
    context: ServingContext,
    request: Request,
    parse: Callable[[Mapping[str, Any]], Body],
    make: Callable[[ServedModel, Body], Made],
) -> Made:
    models = context.models
    context.repository.check_open()
    limits = models.json_limits
    size, body = await decode_body(
        request,
        context.config.max_body_bytes,
        context.decoding,
        lambda content: (len(content), parse(parse_object(content, limits))),
    )
    model = models.asked(body.model)
    ready = context.repository.ready(model, requested_seconds(request))
    model = await (ready if model.health.is_ready else until_disconnect(request, ready))
    return await context.decoding.run(size, lambda: make(model, body))


async def _response(context: ServingContext, request: Request, body: SamplingFields, call: Call) -> Response:
    if body.stream:
        return await open_event_stream(request, call.events(), openai_error, context.metrics)
    return json_response(await until_disconnect(request, call.whole()))


def requested_seconds(request: Request) -> float | None:
    """The time that the client's header allows."""
    return parse_timeout_header(request.headers.get(TIMEOUT_HEADER))


def _card(model: ServedModel, name: str, created: int) -> dict[str, Any]:
    ready = model.ready
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "pagoda",
        "root": model.root,
        "parent": model.parent,
        "max_model_len": ready.max_model_len if ready is not None else None,
    }


def _num_token_ids(model: ServedModel) -> int:
    """Ids of the model or of its tokenizer: either may have some that the other has not."""
    ready = model.ready
    return max(model.text.pool.tokenizer.vocab_size, ready.vocab_size if ready is not None else 0)


def _checked(model: ServedModel, body: TokenizeRequest) -> tuple[ServedModel, TokenizeRequest]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give exactly one of prompt and messages", "prompt")
    return model, body


async def _tokenize(model: ServedModel, body: TokenizeRequest) -> dict[str, Any]:
    pool = model.text.pool
    if body.prompt is not None:
        token_ids = await pool.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        messages = template_messages(body.messages or [])
        token_ids = await encode_chat(model, body, messages, tools=template_tools(body.tools, None))
    ready = model.ready
    return {
        "count": len(token_ids),
        "max_model_len": ready.max_model_len if ready is not None else None,
        "tokens": token_ids,
        "token_strs": await pool.decode_each(token_ids) if body.return_token_strs else None,
    }
