"""Errors in Anthropic's shape."""

from __future__ import annotations

from typing import Any

from pagoda.errors import ErrorKind
from pagoda.serving.http.event_stream import named_event
from pagoda.serving.status import ErrorReport

PATH_PREFIX = "/v1/messages"
_TYPES = {
    ErrorKind.INVALID_REQUEST: "invalid_request_error",
    ErrorKind.CONTEXT_LENGTH_EXCEEDED: "invalid_request_error",
    ErrorKind.NOT_SUPPORTED: "invalid_request_error",
    ErrorKind.UNAUTHENTICATED: "authentication_error",
    ErrorKind.PERMISSION_DENIED: "permission_error",
    ErrorKind.NOT_FOUND: "not_found_error",
    ErrorKind.TOO_LARGE: "request_too_large",
    ErrorKind.QUEUE_FULL: "rate_limit_error",
    ErrorKind.RATE_LIMITED: "rate_limit_error",
    ErrorKind.NOT_READY: "overloaded_error",
    ErrorKind.ENGINE_DEAD: "overloaded_error",
    ErrorKind.DEADLINE_EXCEEDED: "timeout_error",
}


def is_anthropic_path(path: str) -> bool:
    """Whether errors on `path` have Anthropic's shape."""
    return path == PATH_PREFIX or path.startswith(PATH_PREFIX + "/")


def anthropic_error(report: ErrorReport) -> dict[str, Any]:
    """The body of an error."""
    return {"type": "error", "error": {"type": _TYPES.get(report.kind, "api_error"), "message": report.message}}


def anthropic_error_event(report: ErrorReport) -> bytes:
    """The last event of a stream that failed."""
    return named_event("error", anthropic_error(report))
