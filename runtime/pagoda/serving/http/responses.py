"""JSON answers, and errors in the shape that the asked route's clients read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from pagoda.errors import ErrorKind
from pagoda.serving.metrics.prometheus import Metrics
from pagoda.serving.status import ErrorReport, report

logger = logging.getLogger(__name__)

JSON = "application/json"
OPENAI_PREFIXES = ("/v1/", "/openai/", "/tokenize", "/detokenize")


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` (plain values) as JSON."""
    return Response(orjson.dumps(content), status, headers, JSON)


def is_openai_path(path: str) -> bool:
    """Whether errors on `path` take OpenAI's shape; all other routes take V2's."""
    return path.startswith(OPENAI_PREFIXES) or path in ("/v1", "/openai")


def openai_error(report: ErrorReport) -> dict[str, Any]:
    """The body of an OpenAI error."""
    return {
        "error": {
            "message": report.message,
            "type": report.openai_type,
            "param": report.param,
            "code": str(report.kind),
        }
    }


def v2_error(report: ErrorReport) -> dict[str, Any]:
    """The body of a V2 error."""
    return {"error": report.message}


def v2_stream_error(report: ErrorReport) -> dict[str, Any]:
    """The last event of a V2 stream that broke off; `code` stands in for the HTTP status, which went out long before."""
    return {"error": report.message, "code": str(report.kind)}


def error_body(path: str, report: ErrorReport) -> dict[str, Any]:
    """The body of an error on `path`."""
    return openai_error(report) if is_openai_path(path) else v2_error(report)


def error_response(path: str, report: ErrorReport) -> Response:
    """The whole answer to a request on `path` that failed."""
    headers: dict[str, str] = {}
    if report.retry_after_seconds is not None:
        headers["retry-after"] = str(report.retry_after_seconds)
    if report.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(error_body(path, report), report.http_status, headers)


def note_error(error: Exception, metrics: Metrics, path: str) -> ErrorReport:
    """What the client may know of `error`, which is counted, and logged where it is a fault of ours."""
    error_report = report(error)
    metrics.count_error(error_report.kind)
    if error_report.kind is ErrorKind.INTERNAL:
        logger.error("internal error on %s", path, exc_info=error)
    return error_report
