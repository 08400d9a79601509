"""`/ui`: the page, out of files that lie in the package, and `/ui/events`, what it shows of the engines.

Everything else that the page does it does over the public routes, with the key of whoever looks at it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from pagoda.errors import PermissionDeniedError
from pagoda.serving.auth.api_keys import KeyUse, caller_var
from pagoda.serving.auth.keys import ApiKey
from pagoda.serving.auth.scopes import Access
from pagoda.serving.context import ServingContext
from pagoda.serving.http.documentation_page import HEADERS
from pagoda.serving.http.event_stream import open_event_stream
from pagoda.serving.http.responses import json_response
from pagoda.serving.ui.events import Viewers
from pagoda.serving.v2.errors import v2_error, v2_errors

DIRECTORY = Path(__file__).parent / "page"
ASSETS = {
    "style.css": "text/css",
    **dict.fromkeys(
        [
            *("app.js", "api.js", "dom.js", "talk.js", "markdown.js", "manage.js"),
            *("watch.js", "recording.js", "charts.js", "trace.js"),
        ],
        "text/javascript",
    ),
}


class KeyReport(BaseModel):
    """A key. `requests` since the server began, the last at `last_used` (since the epoch); `rate_limits`: OpenAI's headers."""

    name: str
    tenant: str
    scopes: list[str]
    requests: int
    last_used: float | None
    rate_limits: dict[str, str]


def ui_router(context: ServingContext) -> APIRouter:
    """The page, its files and its events."""
    router = APIRouter(prefix="/ui", tags=["server"])
    viewers = Viewers(context)

    @router.get("", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(DIRECTORY / "index.html", headers=HEADERS, media_type="text/html")

    @router.get(
        "/events",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, **v2_errors(400, 403, 429)},
    )
    async def events(request: Request, kernels: bool = False) -> Response:
        """Server-sent events of what the engines do: health, figures, steps and the KV cache's blocks, while it is open.

        `kernels`: with what torch runs in each step, which slows the engine down and needs the scope `admin`.
        """
        if kernels and not Access.ADMIN.admits(caller_var.get().scopes):
            raise PermissionDeniedError("kernels need a key with the scope admin")
        return await open_event_stream(request, viewers.watch(kernels=kernels), v2_error, context.metrics)

    @router.get("/keys", response_model=list[KeyReport], responses=v2_errors(401, 403))
    async def keys() -> Response:
        """Every API key by its name: what it may do, how often it was used, and what its tenant has left of its limits."""
        return json_response([_key_report(context, key) for key in context.keys])

    @router.get("/{asset}", include_in_schema=False)  # after /events
    async def file(asset: str) -> Response:
        if asset not in ASSETS:
            raise HTTPException(404)
        return FileResponse(DIRECTORY / asset, headers=HEADERS, media_type=ASSETS[asset])

    return router


def _key_report(context: ServingContext, key: ApiKey) -> dict[str, Any]:
    use = context.keys.uses.get(key.name, KeyUse())
    return {
        "name": key.name,
        "tenant": key.tenant,
        "scopes": sorted(key.scopes),
        "requests": use.requests,
        "last_used": use.last,
        "rate_limits": context.rate_limits.headers(key.tenant, key.limits),
    }
