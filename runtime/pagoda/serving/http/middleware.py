"""What every REST request passes first: an id, the API key, and a last net for errors."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagoda.errors import InvalidRequestError, ModelNotFoundError
from pagoda.logs import bind_request_id
from pagoda.serving.auth import ApiKeys
from pagoda.serving.http.responses import error_body, error_response, json_response, note_error
from pagoda.serving.metrics.prometheus import Metrics

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
PUBLIC_PATHS = frozenset({"/", "/health", "/metrics", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"})
PUBLIC_PATTERN = re.compile(r"/v2/models/[^/]+(/versions/[^/]+)?/ready")
"""What probes and scrapers ask needs no key: they have none, and nothing of the clients shows there."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class Gate:
    """ASGI middleware around all routes. Errors of any kind become an answer here; none reaches the server's own handler."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, metrics: Metrics) -> None:
        self.app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        path: str = scope["path"]
        with bind_request_id(request_id):
            try:
                if not is_public(path):
                    self._keys.check(headers.get("authorization"))
                await self.app(scope, receive, send_with_id)
            except ClientDisconnect:
                logger.debug("the client left before %s was answered", path)
            except Exception as error:  # the outermost layer: every failure gets an answer, or is raised on
                if has_started:
                    logger.exception("the answer on %s broke off", path)
                    raise
                await self.answer(scope, error)(scope, receive, send_with_id)

    def answer(self, scope: Scope, error: Exception) -> Response:
        """The answer to a request that failed with `error`; counts it, and logs what is a fault of ours."""
        path = scope["path"]
        if isinstance(error, HTTPException) and error.status_code == 405:
            wrong = InvalidRequestError(f"{scope['method']} is not allowed on {path[:200]!r}")
            return json_response(error_body(path, note_error(wrong, self._metrics, path)), 405, error.headers)
        if isinstance(error, HTTPException):
            error = ModelNotFoundError(f"there is no route {path[:200]!r} here")
        return error_response(path, note_error(error, self._metrics, path))


def is_public(path: str) -> bool:
    """Whether `path` is answered without an API key."""
    return path in PUBLIC_PATHS or PUBLIC_PATTERN.fullmatch(path) is not None


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
