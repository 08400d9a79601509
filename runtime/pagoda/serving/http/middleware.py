"""What every REST request passes first: a request id, the API key, and errors of any kind as responses."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagoda.errors import InvalidRequestError, ModelNotFoundError
from pagoda.logs import bind_request_id
from pagoda.serving.auth import audit
from pagoda.serving.auth.api_keys import ApiKeys
from pagoda.serving.auth.routes import RouteAccess
from pagoda.serving.auth.scopes import Access
from pagoda.serving.http.responses import json_response, report_error
from pagoda.serving.inference_headers import inference_headers_var, read_headers
from pagoda.serving.metrics.prometheus import Metrics
from pagoda.serving.rate_limits import RateLimiter
from pagoda.serving.request_turns import RequestTurns
from pagoda.serving.status import ErrorReport
from pagoda.serving.tracing.seam import Tracing
from pagoda.tenants import UNLIMITED, TenantLimits

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

ErrorBody = Callable[[str, ErrorReport], dict[str, Any]]


class RequestMiddleware:
    """ASGI middleware around all routes; no error reaches the server's own handler before the response has started.

    `access`: what a request must bring. `error_body`: the body of an error on a path. `objectives`: see `read_headers`.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        metrics: Metrics,
        access: RouteAccess,
        error_body: ErrorBody,
        rate_limits: RateLimiter,
        turns: RequestTurns,
        objectives: Mapping[str, int],
        tracing: Tracing,
    ) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._access = access
        self._error_body = error_body
        self._rate_limits = rate_limits
        self._turns = turns
        self._objectives = objectives
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or respond with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the connection leaves out the body
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        has_started = False
        status = 0
        limits: TenantLimits = UNLIMITED
        tenant = ""

        async def send_with_id(message: Message) -> None:
            nonlocal has_started, status
            if message["type"] == "http.response.start":
                has_started, status = True, message["status"]
                added = MutableHeaders(scope=message)
                added[REQUEST_ID_HEADER] = request_id
                added.update(self._rate_limits.headers(tenant, limits))
                added.update(span.response_headers())
            await send(message)

        path: str = scope["path"]
        access = self._access.of(scope["method"], path)
        peer = scope["client"][0] if scope["client"] else ""
        with (
            bind_request_id(request_id),
            audit.recorded(access, f"{scope['method']} {path}", peer, lambda: status),
            self._tracing.http_call(scope, headers.get, lambda: status) as span,
        ):
            try:
                caller = await self._keys.admit(access, _authorization(headers), peer)
                if access is Access.INFER:
                    tenant, limits = caller.tenant, caller.limits
                    span.begin()
                    inference_headers_var.set(read_headers(headers.get, self._objectives))
                    await self._turns.begin(caller)
                await self._app(scope, receive, send_with_id)
            except ClientDisconnect:
                logger.debug("client disconnected before the response to %s was complete", path)
            except Exception as error:  # the outermost layer: every failure gets a response, or is raised on
                if has_started:
                    logger.exception("response to %s aborted after its headers were sent", path)
                    raise
                await self._error_response(scope, error)(scope, receive, send_with_id)

    def _error_response(self, scope: Scope, error: Exception) -> Response:
        """The response to a request that failed with `error`; counts it, and logs internal errors."""
        path: str = scope["path"]
        headers: dict[str, str] = {}
        status: int | None = None
        if isinstance(error, HTTPException) and error.status_code == 405:
            headers, status = dict(error.headers or {}), 405
            error = InvalidRequestError(f"{scope['method']} is not allowed on {path[:200]!r}")
        elif isinstance(error, HTTPException):
            error = ModelNotFoundError(f"there is no route {path[:200]!r} here")
        report = report_error(error, self._metrics, path)
        if report.retry_after_seconds is not None:
            headers["retry-after"] = str(report.retry_after_seconds)
        if report.http_status == 401:
            headers["www-authenticate"] = "Bearer"
        return json_response(self._error_body(path, report), status or report.http_status, headers)


def _authorization(headers: Headers) -> str | None:
    """The key that was sent: as everywhere, or as Anthropic's clients send it."""
    if (api_key := headers.get("x-api-key")) and "authorization" not in headers:
        return f"Bearer {api_key}"
    return headers.get("authorization")


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
