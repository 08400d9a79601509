"""GET and PATCH /settings: what is in force, where it comes from, and changing what can."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, RootModel
from starlette.responses import Response

from pagoda.errors import InvalidRequestError
from pagoda.serving.auth.api_keys import caller_var
from pagoda.serving.context import ServingContext
from pagoda.serving.http.bodies import decode_body, parse_object
from pagoda.serving.http.documentation import request_body
from pagoda.serving.http.responses import json_response
from pagoda.serving.settings import Settings
from pagoda.serving.v2.errors import v2_errors


class SettingsChange(RootModel[dict[str, Any]]):
    """Settings by their names, with values as in a configuration file."""


class Setting(BaseModel):
    """A setting: its value, where that comes from, and whether and when it can change while the server runs."""

    value: Any
    default: Any
    source: str
    can_change: bool
    note: str


class SettingsResponse(BaseModel):
    """`generation` counts the times that settings were in force anew. `models`: of several, each one's own."""

    generation: int
    settings: dict[str, Setting]
    models: list[str]


class ChangedResponse(BaseModel):
    """What has changed: of each setting the value before and after."""

    generation: int
    changed: dict[str, dict[str, Any]]


def settings_router(context: ServingContext, settings: Settings) -> APIRouter:
    """Both routes; `model` names one of several models."""
    router = APIRouter(tags=["server"])

    @router.get("/settings", response_model=SettingsResponse, responses=v2_errors(401, 404))
    async def shown(model: str | None = None) -> Response:
        """Every setting but the secret ones, of the server or of one model."""
        return json_response(
            {
                "generation": settings.generation,
                "settings": settings.shown(model),
                "models": [served.name for served in context.models],
            }
        )

    @router.patch(
        "/settings",
        response_model=ChangedResponse,
        responses=v2_errors(400, 401, 404, 413, 503),
        openapi_extra=request_body(SettingsChange),
    )
    async def change(request: Request, model: str | None = None) -> Response:
        """Change settings: all of them, or none."""
        body = await decode_body(request, context.config.max_body_bytes, context.decoding, parse_object)
        if not body:
            raise InvalidRequestError("the body must have a setting")
        found = await settings.change(body, f"PATCH by {caller_var.get().name}", model)
        return json_response(
            {
                "generation": settings.generation,
                "changed": {name: {"before": before, "after": after} for name, (before, after) in found.items()},
            }
        )

    return router
