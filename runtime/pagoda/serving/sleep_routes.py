"""vLLM's sleep mode: /sleep, /wake_up and /is_sleeping, of all models or of the one that `model` names."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from pagoda.engine.health import NOT_LOADED, EngineState
from pagoda.errors import InvalidRequestError, shown
from pagoda.serving.context import ServingContext
from pagoda.serving.http.responses import json_response
from pagoda.serving.models import ServedModel
from pagoda.serving.v2.errors import v2_errors

LEVELS = {"0": 0, "1": 1, "2": 2}


class SleepingResponse(BaseModel):
    """Whether every model that was asked about is asleep."""

    is_sleeping: bool


def sleep_router(context: ServingContext) -> APIRouter:
    """The three routes. Models that are not loaded have no part in them."""
    router = APIRouter(tags=["server"])
    errors = v2_errors(400, 401, 404, 503)

    def asked(model: str | None) -> list[ServedModel]:
        if model is not None:
            return [context.models.find(model)]
        return [one for one in context.models if one.health.state not in NOT_LOADED]

    @router.post("/sleep", response_class=Response, responses=errors)
    async def sleep(level: str = "1", model: str | None = None) -> Response:
        """Give back weights and KV cache when running requests have ended; level 2: the files in the page cache, too."""
        if level not in LEVELS:
            raise InvalidRequestError(f"level must be 0, 1 or 2, got {shown(level)}", "level")
        if LEVELS[level]:
            await asyncio.gather(*(context.repository.sleep(one, LEVELS[level]) for one in asked(model)))
        return Response()

    @router.post("/wake_up", response_class=Response, responses=errors)
    async def wake_up(model: str | None = None) -> Response:
        """Take weights and KV cache again; returns when requests are taken."""
        await asyncio.gather(*(context.repository.wake_up(one) for one in asked(model)))
        return Response()

    @router.get("/is_sleeping", response_model=SleepingResponse, responses=v2_errors(401, 404))
    async def is_sleeping(model: str | None = None) -> Response:
        """Whether the models are asleep."""
        states = [one.health.state for one in asked(model)]
        return json_response({"is_sleeping": bool(states) and all(one is EngineState.SLEEPING for one in states)})

    return router
