"""`/docs`: Swagger UI over `/openapi.json`, out of files that lie in the package: no other host is asked for anything."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

DIRECTORY = Path(__file__).parent / "swagger_ui"
ASSETS = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "initialize.js": "text/javascript",
}
HEADERS = {
    # Scripts and styles are files of this server, and requests go to it alone. Images of the style sheet are data in it.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def documentation_router() -> APIRouter:
    """`/docs` and the files it consists of."""
    router = APIRouter(prefix="/docs", include_in_schema=False)
    router.add_api_route("", _file("index.html", "text/html"), methods=["GET"])
    for name, media_type in ASSETS.items():
        router.add_api_route(f"/{name}", _file(name, media_type), methods=["GET"])
    return router


def _file(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        return FileResponse(DIRECTORY / name, headers=HEADERS, media_type=media_type)

    return file
