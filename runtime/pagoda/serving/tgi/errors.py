"""Errors in the shape of Text Generation Inference, whose clients tell them apart by `error_type`."""

from __future__ import annotations

from functools import partial
from typing import Any

from pydantic import BaseModel

from pagoda.errors import ErrorKind
from pagoda.serving.http.documentation import error_responses
from pagoda.serving.status import ErrorReport

PATHS = ("/", "/generate", "/generate_stream", "/info")
_TYPES = {
    ErrorKind.INVALID_REQUEST: "validation",
    ErrorKind.CONTEXT_LENGTH_EXCEEDED: "validation",
    ErrorKind.NOT_SUPPORTED: "validation",
    ErrorKind.TOO_LARGE: "validation",
    ErrorKind.QUEUE_FULL: "overloaded",
    ErrorKind.RATE_LIMITED: "overloaded",
    ErrorKind.NOT_READY: "unhealthy",
    ErrorKind.ENGINE_DEAD: "unhealthy",
    ErrorKind.DEADLINE_EXCEEDED: "incomplete_generation",
}


class TgiErrorResponse(BaseModel):
    """The body of an error."""

    error: str
    error_type: str


tgi_errors = partial(error_responses, TgiErrorResponse)
"""`responses` of a route for these error statuses."""


def is_tgi_path(path: str) -> bool:
    """Whether errors on `path` have this shape."""
    return path in PATHS


def tgi_error(report: ErrorReport) -> dict[str, Any]:
    """The body of an error."""
    return {"error": report.message, "error_type": _TYPES.get(report.kind, "generation")}
