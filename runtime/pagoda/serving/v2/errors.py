"""Errors in V2's shape, which all routes but OpenAI's have."""

from __future__ import annotations

from functools import partial
from typing import Any

from pydantic import BaseModel

from pagoda.serving.http.documentation import error_responses
from pagoda.serving.status import ErrorReport


class V2Error(BaseModel):
    """The body of an error."""

    error: str


v2_errors = partial(error_responses, V2Error)
"""`responses` of a route for these error statuses."""


def v2_error(report: ErrorReport) -> dict[str, Any]:
    """The body of an error."""
    return {"error": report.message}


def v2_stream_error(report: ErrorReport) -> dict[str, Any]:
    """The last event of a stream that failed after its status line was sent; `code` is the kind of error."""
    return {"error": report.message, "code": str(report.kind)}
