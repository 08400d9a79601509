"""vLLM's routes to load and unload LoRA adapters while the server runs."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import PlainTextResponse, Response

from pagoda.errors import ModelNotFoundError, shown
from pagoda.serving.adapters import AdapterManager
from pagoda.serving.context import ServingContext
from pagoda.serving.http.bodies import decode_body, parse_object
from pagoda.serving.http.documentation import request_body
from pagoda.serving.openai.errors import openai_errors
from pagoda.serving.openai.requests import parsed


class LoadLoraAdapterRequest(BaseModel):
    """`lora_path`: a directory of the server, with a PEFT checkpoint. `load_inplace`: in the place of one of that name.

    `base_model_name`: the model that it is for, where several are served.
    """

    model_config = ConfigDict(extra="allow")

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    base_model_name: str | None = None


class UnloadLoraAdapterRequest(BaseModel):
    """`lora_int_id` is vLLM's, and not needed."""

    model_config = ConfigDict(extra="allow")

    lora_name: str
    lora_int_id: int | None = None


Body = TypeVar("Body", LoadLoraAdapterRequest, UnloadLoraAdapterRequest)
BODIES = (LoadLoraAdapterRequest, UnloadLoraAdapterRequest)


def adapter_router(context: ServingContext) -> APIRouter:
    """Both routes, under /v1."""
    router = APIRouter(prefix="/v1", tags=["adapters"])
    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    said: dict[int | str, dict[str, Any]] = {**text, **openai_errors(400, 401, 403, 404, 413, 503)}

    async def read(request: Request, kind: type[Body]) -> Body:
        return await decode_body(
            request,
            context.config.max_body_bytes,
            context.decoding,
            lambda content: parsed(kind, parse_object(content)),
        )

    @router.post(
        "/load_lora_adapter",
        response_class=Response,  # its errors are JSON
        responses=said,
        openapi_extra=request_body(LoadLoraAdapterRequest),
    )
    async def load(request: Request) -> Response:
        """Serve an adapter from now on, until it is unloaded or the server ends."""
        body = await read(request, LoadLoraAdapterRequest)
        manager = _manager_of(context, body.base_model_name)
        manager.model.health.check_ready()
        await manager.load(body.lora_name, body.lora_path, in_place=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post(
        "/unload_lora_adapter",
        response_class=Response,  # its errors are JSON
        responses=said,
        openapi_extra=request_body(UnloadLoraAdapterRequest),
    )
    async def unload(request: Request) -> Response:
        """Serve an adapter no longer; requests that run with it go on."""
        body = await read(request, UnloadLoraAdapterRequest)
        managers = context.repository.adapters
        manager = next((each for each in managers if body.lora_name in each.model.adapters), managers[0])
        await manager.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _manager_of(context: ServingContext, model_name: str | None) -> AdapterManager:
    if model_name is None:
        return context.repository.adapters[0]
    for manager in context.repository.adapters:
        if model_name in manager.model.names:
            return manager
    raise ModelNotFoundError(f"model {shown(model_name)} is not served here")
