"""Routes that platforms and people who come from vLLM call: SageMaker's ping, load, what the server is, resets."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

import pagoda
from pagoda.platform.hardware import cpu_report, memory_report, versions
from pagoda.serving.context import ServingContext
from pagoda.serving.http.responses import json_response
from pagoda.serving.v2.errors import v2_errors


class LoadResponse(BaseModel):
    """Sequences in the engine, running and waiting."""

    server_load: int


class ServerInfoResponse(BaseModel):
    """Every setting but the secret ones, as it was given or left to its default; `system_env`: the machine, and versions."""

    version: str
    config: dict[str, Any]
    system_env: dict[str, Any]


class ResetResponse(BaseModel):
    """Whether it was done."""

    success: bool


class TokenizerInfoResponse(BaseModel):
    """The tokenizer of the served model."""

    vocab_size: int
    special_tokens: dict[str, str]
    chat_template: str | None
    chat_templates: dict[str, str]


def platform_router(context: ServingContext) -> APIRouter:
    """All of them; `/tokenizer_info` where it is enabled."""
    router = APIRouter(tags=["server"])

    async def ping() -> Response:
        """200 while the server accepts requests, as SageMaker asks for it."""
        return Response(status_code=200 if context.health.is_ready else 503)

    router.add_api_route("/ping", ping, methods=["GET"], response_class=Response, responses=v2_errors(503))
    router.add_api_route("/ping", ping, methods=["POST"], include_in_schema=False)

    @router.get("/load", response_model=LoadResponse)
    async def load() -> Response:
        """How many sequences are in the engine."""
        stats = [served.client.stats for served in context.models]
        return json_response({"server_load": sum(one.num_running + one.num_waiting for one in stats)})

    @router.get("/server_info", response_model=ServerInfoResponse)
    async def server_info() -> Response:
        """Version, settings and machine."""
        system = await asyncio.to_thread(_system)
        config = context.config.without_secrets()
        return json_response({"version": pagoda.__version__, "config": config, "system_env": system})

    @router.post("/reset_prefix_cache", response_model=ResetResponse, responses=v2_errors(503))
    async def reset_prefix_cache() -> Response:
        """Let no request from now on find what others have computed; those that run go on."""
        context.health.check_ready()
        for served in context.models:
            if served.health.is_ready:
                served.client.reset_prefix_cache()
        return json_response({"success": True})

    if context.config.enable_tokenizer_info_endpoint:

        @router.get("/tokenizer_info", response_model=TokenizerInfoResponse, responses=v2_errors(503))
        async def tokenizer_info(model: str | None = None) -> Response:
            """Special tokens and chat templates."""
            served = context.models.asked(model)
            served.health.check_ready()
            tokenizer = served.text.pool.tokenizer
            templates = tokenizer.chat_templates
            return json_response(
                {
                    "vocab_size": tokenizer.vocab_size,
                    "special_tokens": tokenizer.special_tokens,
                    "chat_template": templates.get("default"),
                    "chat_templates": templates,
                }
            )

    return router


def _system() -> dict[str, Any]:
    """What `pagoda doctor` says of the machine but for its GPUs, for which torch would be imported; sizes in bytes."""
    cpu, memory = asdict(cpu_report()), asdict(memory_report())
    return {"cpu": cpu, "memory": memory, "versions": {name: found for name, found in versions().items() if found}}
